"""Addresses in MLflow's web pages, relative to its root, with gaps where MLflow's own ids go.

The ids are not known when a text is written, and another store has others: whoever delivers the text fills them in.
The forms are those of MLflow 3.17; an address that another version does not know opens its list of experiments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from urllib.parse import quote

EXPERIMENT = "~experiment~"
_RUN = re.compile(r"~run/([^~]+)~")
_KIND = "workflowType=machine_learning"
"""Without it MLflow shows its pages for language models."""


def run_id(run: str) -> str:
    """The gap for the id of a run, by our own name of it."""
    return f"~run/{run}~"


def filled(text: str, experiment: str, id_of: Callable[[str], str | None]) -> str:
    """A text with MLflow's ids in its gaps; of a run that ``id_of`` does not know the gap stays."""
    return _RUN.sub(lambda gap: id_of(gap[1]) or gap[0], text.replace(EXPERIMENT, experiment))


def page(run: str) -> str:
    """The page of a run."""
    return f"#/experiments/{EXPERIMENT}/runs/{run_id(run)}?{_KIND}"


def artifacts(run: str, path: str) -> str:
    """The page of a run's artifact, a file or a folder."""
    return f"#/experiments/{EXPERIMENT}/runs/{run_id(run)}/artifacts/{quote(path)}?{_KIND}"


def picture(run: str, path: str) -> str:
    """An artifact itself, for showing it within a page."""
    return f"get-artifact?path={quote(path)}&run_uuid={run_id(run)}"


def compare(runs: Sequence[str]) -> str:
    """The page that compares runs: parallel coordinates, scatter, box and contour plots."""
    ids = ",".join(f'"{run_id(run)}"' for run in runs)
    return f"#/compare-runs?runs={quote(f'[{ids}]', safe='/~')}&experiments=%5B%22{EXPERIMENT}%22%5D&{_KIND}"


def runs(wanted: str, order: str) -> str:
    """The runs that fit a filter, ascending in a metric."""
    query = f"searchFilter={quote(wanted, safe='/~')}&orderByKey={quote(f'metrics.`{order}`')}&orderByAsc=true"
    return f"#/experiments/{EXPERIMENT}/runs?{query}&{_KIND}"


def view(name: str, *, charts: bool = False) -> str:
    """A view of the experiment's runs that is kept under a name, as a table or as charts."""
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"#/experiments/{EXPERIMENT}/runs?viewStateShareKey={quote(name)}{mode}&{_KIND}"
