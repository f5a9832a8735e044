"""MLflow, written to by the driver alone: one parent run per search, one child run per trial, none doubled."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cedm_ray.errors import UserError

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

KEY_TAG = "cedm_ray.key"
MAX_PARAM = 500


def database_uri(storage: Path) -> str:
    """The tracking database in a storage folder."""
    return f"sqlite:///{storage / 'mlflow.db'}"


def ui_command(uri: str) -> str:
    """The command that opens the MLflow UI on this tracking store, fit for pasting into a shell."""
    program = Path(sys.executable).with_name("mlflow")
    with contextlib.suppress(ValueError):
        program = program.relative_to(Path.cwd())
    # One worker and no job runner: answers in seconds, where the default takes most of a minute on two cores.
    return (
        f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {program} server --workers 1 --host 127.0.0.1 --port 5000 "
        f"--backend-store-uri '{uri}'"
    )


class Tracker:
    """One search in MLflow.

    Args:
        uri: Tracking URI; the database is made on first use.
        experiment: Name of the experiment; made if it does not exist.
        artifacts: Absolute folder for the artifacts of a new experiment (None: where the server keeps them).

    Raises:
        UserError: If the tracking store does not answer.
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path | None) -> None:
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self._opened: dict[str, str] = {}  # run ids by key
        self._logged: dict[str, set[int]] = {}  # kimg that a run has by its id
        try:
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            self.experiment_id = (
                found.experiment_id
                if found
                else self._client.create_experiment(experiment, artifacts.as_uri() if artifacts else None)
            )
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise UserError(
                f"tracking store {uri} does not answer ({_first_line(error)}); start it, or give another --tracking-uri"
            ) from error
        self.uri, self.parent_id = uri, ""

    def start(self, key: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
        """Open the parent run of a search, or go on with it; returns its id."""
        self.parent_id = self._open(key, name, params, tags)
        return self.parent_id

    def child(self, key: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
        """Open the child run of a trial, or go on with it; returns its id."""
        return self._open(f"{self.parent_id}/{key}", name, params, {**tags, "mlflow.parentRunId": self.parent_id})

    def _open(self, key: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
        if key in self._opened:
            self._tag(self._opened[key], tags)
            return self._opened[key]
        run_id = self._opened[key] = self._found(key, tags) or self._created(key, name, params, tags)
        return run_id

    def _found(self, key: str, tags: Mapping[str, Any]) -> str | None:
        """A run that an earlier process of this search opened."""
        found = self._client.search_runs([self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        if not found:
            return None
        run_id = str(found[0].info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        self._logged[run_id] = {metric.step for metric in self._client.get_metric_history(run_id, "kimg")}
        self._tag(run_id, tags)
        return run_id

    def _created(self, key: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
        run = self._client.create_run(self.experiment_id, tags={KEY_TAG: key, **_texts(tags)}, run_name=name)
        self._client.log_batch(run.info.run_id, params=[Param(k, v[:MAX_PARAM]) for k, v in _texts(params).items()])
        return str(run.info.run_id)

    def metrics(self, run_id: str, values: Mapping[str, float], kimg: int) -> None:
        """Log metrics at a number of kimg, once: the second time the same kimg is left out."""
        logged = self._logged.setdefault(run_id, set())
        if kimg in logged:
            return
        logged.add(kimg)
        self.points(run_id, {**values, "kimg": float(kimg)}, kimg)

    def points(self, run_id: str, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step of their own."""
        now_ms = int(time.time() * 1000)
        self._client.log_batch(run_id, metrics=[Metric(k, float(v), now_ms, step) for k, v in values.items()])

    def series(self, run_id: str, name: str, values: Sequence[float]) -> None:
        """Log one metric at the steps 0, 1, ..., once: where the run has it already, it is left out."""
        if values and not self._client.get_metric_history(run_id, name):
            now_ms = int(time.time() * 1000)
            points = [Metric(name, float(value), now_ms, step) for step, value in enumerate(values)]
            self._client.log_batch(run_id, metrics=points)

    def artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Add a file to a run."""
        self._client.log_artifact(run_id, str(path), folder)

    def end(self, run_id: str, state: str, tags: Mapping[str, Any] | None = None) -> None:
        """Close a run; ``state`` is kept as a tag and decides MLflow's own status."""
        self._tag(run_id, {"state": state, **(tags or {})})
        status = {"failed": "FAILED", "interrupted": "KILLED"}.get(state, "FINISHED")
        self._client.set_terminated(run_id, status)

    def describe(self, run_id: str, text: str) -> None:
        """The description that MLflow shows on the run's page (Markdown)."""
        self._tag(run_id, {"mlflow.note.content": text})

    def _tag(self, run_id: str, tags: Mapping[str, Any]) -> None:
        self._client.log_batch(run_id, tags=[RunTag(k, v) for k, v in _texts(tags).items()])


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items() if value is not None}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, for example ``temi.gamma``."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out.update(flat(value, f"{prefix}{name}."))
        else:
            out[f"{prefix}{name}"] = value
    return out
