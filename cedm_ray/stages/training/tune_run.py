"""What every run of Tune has in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ray.tune
from ray.widgets.util import in_notebook

from cedm_ray.stages.training.interruptions import MOST_IN_A_ROW


def run_settings(name: str, folder: Path, callbacks: Sequence[ray.tune.Callback]) -> ray.tune.RunConfig:
    """Settings of a run that prints nothing and that tries a trial again whose processes were killed.

    Args:
        name: Of the run, and of its folder.
        folder: Where that folder lies.
        callbacks: Hear of its trials.
    """
    # In a notebook Tune's own reporter, whatever ``verbose`` is, clears the cell again and again; elsewhere Tune warns
    # of a reporter that it is given.
    reporter = ray.tune.CLIReporter() if in_notebook() else None
    return ray.tune.RunConfig(
        name=name,
        storage_path=str(folder),
        verbose=0,
        progress_reporter=reporter,
        callbacks=list(callbacks),
        failure_config=ray.tune.FailureConfig(max_failures=MOST_IN_A_ROW - 1),
    )
