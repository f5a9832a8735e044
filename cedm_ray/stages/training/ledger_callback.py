"""What Tune hears of trials, passed on to the ledger."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cedm_ray.stages.show.stopping import Stopping
from cedm_ray.stages.training.driver_only import DriverCallback
from cedm_ray.stages.training.interruptions import FAILED
from cedm_ray.stages.training.ledger import Ledger


class LedgerCallback(DriverCallback):
    """Tells the ledger what Tune hears; runs in the driver alone."""

    def __init__(self, ledger: Ledger, stopping: Stopping | None = None) -> None:
        self._ledger, self._stopping = ledger, stopping or Stopping()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ledger.open(trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        if FAILED in result:
            self._ledger.close(trial.config, reason=result[FAILED])
        else:
            self._ledger.add(trial.config, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._stopping.asked:
            self._ledger.leave(trial.config)
        else:
            self._ledger.close(trial.config)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ledger.close(trial.config, reason=_reason(Path(trial.error_file)))


def _reason(error_file: Path) -> str:
    """What went wrong, from the traceback that Tune wrote: the last line that names an error."""
    if not error_file.is_file():
        return f"no reason given; Tune looked for it in {error_file}"
    lines = [line.strip() for line in error_file.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or ["no reason given"])[-1][:300]
