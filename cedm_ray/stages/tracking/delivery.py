"""Writes operations into one MLflow store such that trying again doubles nothing."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from cedm_ray.addresses import without_credentials
from cedm_ray.errors import UserError, first_line
from cedm_ray.stages.storage.disk_faults import find_fault
from cedm_ray.stages.tracking import links
from cedm_ray.stages.tracking.outbox import Operation, OutageError, RefusedError

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
# The outbox tries again by itself, and looks first whether the last try arrived, which MLflow's own retries do not.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
# Links to the runs, with whatever name and password the tracking URI holds; our own are without.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import OperationalError

KEY_TAG = "cedm_ray.key"
NOTE_TAG = "mlflow.note.content"
VIEW_TAG = "mlflow.sharedViewState."
"""Of an experiment; the rest of the tag's name is what a link calls the view by."""
MAX_FLOAT = 1.7976931348623157e308  # what MLflow's databases make of infinity
BUSY = (408, 429)  # HTTP statuses that say "later", as those from 500 on do
FIRST_WAIT_S = {"sqlite": 60.0, "other": 10.0}


class Delivery:
    """One MLflow store, as the outbox's thread writes to it.

    Args:
        uri: Tracking URI; a database is made on first use.
        experiment: Name of the experiment; made if it does not exist.
        artifacts: Absolute folder for the artifacts of a new experiment (None: where the server keeps them).
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path | None) -> None:
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # an outage is told once, by the outbox
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self._uri, self._name, self._artifacts = uri, experiment, artifacts
        self.ids: dict[str, str] = {}
        """MLflow's ids of the runs, as far as they are known."""
        self._opened: dict[str, Operation] = {}
        self._foreign: set[str] = set()  # runs that were there before this journal spoke of them
        self._seen: dict[tuple[str, str], dict[int, set[str]]] = {}  # values by step of a run's metric
        self._lock = threading.Lock()
        self._client: Any = None
        self._experiment_id = ""

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment, None while it is not known."""
        return self._experiment_id or None

    def knows(self, run: str) -> bool:
        """Whether this journal has opened a run."""
        return run in self._opened

    def connect(self) -> None:
        """Reach the store and make the experiment, unless that is done.

        Raises:
            Exception: Whatever MLflow, its database or the network say.
        """
        with self._lock:
            if self._client is None:
                _look_into(self._uri)
                self._client = MlflowClient(tracking_uri=self._uri)
            if not self._experiment_id:
                found = self._client.get_experiment_by_name(self._name)
                place = self._artifacts.as_uri() if self._artifacts else None
                made = found.experiment_id if found else self._client.create_experiment(self._name, place)
                self._experiment_id = str(made)

    def first_connect(self) -> None:
        """Reach the store if it answers; one that is away is left for later.

        Raises:
            UserError: If it never will: no such kind of store, no database, access refused.
        """
        errors: list[Exception] = []

        def attempt() -> None:
            try:
                self.connect()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=attempt, daemon=True, name="tracking")
        thread.start()
        thread.join(FIRST_WAIT_S["sqlite" if self._uri.startswith("sqlite") else "other"])
        if errors and not _is_away(errors[0], self._uri):
            raise UserError(
                f"tracking store {without_credentials(self._uri)} does not answer ({_reason(errors[0])}); start it, "
                f"or give another --tracking-uri"
            ) from errors[0]

    def recall(self, operation: Operation, receipt: Mapping[str, Any] | None) -> None:
        """Take in what the journal says of an operation; the receipt is this store's, if it has the operation."""
        if operation.kind == "open":
            self._opened.setdefault(operation.run, operation)
            if receipt is not None and "run_id" in receipt:
                self.ids[operation.run] = receipt["run_id"]
                if receipt["found"]:
                    self._foreign.add(operation.run)

    def send(self, operation: Operation, unsure: bool) -> Mapping[str, Any]:
        """Write one operation; see :class:`cedm_ray.stages.tracking.outbox.Outbox`."""
        try:
            return self._write(operation, unsure)
        except Exception as error:
            self._forget(operation.run, ids=_is_refused(error))
            if not _is_refused(error):
                raise OutageError(_reason(error)) from error
        # Somebody may have deleted the run or the experiment, or begun the store anew: look for them once more.
        try:
            return self._write(operation, unsure=True)
        except Exception as error:
            self._forget(operation.run)
            raise (RefusedError if _is_refused(error) else OutageError)(_reason(error)) from error

    def _forget(self, run: str, *, ids: bool = False) -> None:
        self._seen = {(of, name): values for (of, name), values in self._seen.items() if of != run}
        if ids:
            parent = self._opened[run].body["parent"] if run in self._opened else None
            self.ids = {of: run_id for of, run_id in self.ids.items() if of not in (run, parent)}
            self._experiment_id = ""

    def _write(self, operation: Operation, unsure: bool) -> Mapping[str, Any]:
        self.recall(operation, None)
        self.connect()
        run, body = operation.run, operation.body
        run_id = self._run_id(run)
        if operation.kind == "open":
            self._client.update_run(run_id, status="RUNNING")
            self._tag(run_id, body["tags"])
            return {"run_id": run_id, "found": run in self._foreign}
        if operation.kind == "artifact":
            self._client.log_artifact(run_id, body["path"], body["folder"])
        elif operation.kind == "note":
            self._tag(run_id, {NOTE_TAG: self._filled(body["text"])})
        elif operation.kind == "view":
            view = self._filled(json.dumps(body["view"], separators=(",", ":")))
            self._client.set_experiment_tag(self._experiment_id, VIEW_TAG + body["name"], view)
        elif operation.kind in ("tags", "end"):
            self._tag(run_id, body["tags"])
            if operation.kind == "end":
                self._client.set_terminated(run_id, body["status"], operation.time_ms)
        else:
            self._log(operation, run_id, look=unsure or run in self._foreign)
        return {}

    def _run_id(self, run: str) -> str:
        """The id of a run, which is looked for by its key, and made if nobody has made it."""
        if run in self.ids:
            return self.ids[run]
        opened = self._opened[run]
        body = opened.body
        key, made = self._find(run)
        if made is not None:
            self._foreign.add(run)
        else:
            tags = {"mlflow.parentRunId": self._run_id(body["parent"])} if body["parent"] else {}
            tags = {KEY_TAG: key, **tags, **body["tags"]}
            made = self._client.create_run(self._experiment_id, opened.time_ms, tags, body["name"])
        run_id, there = str(made.info.run_id), made.data.params
        params = [Param(name, value) for name, value in body["params"].items() if name not in there]
        self._client.log_batch(run_id, params=params)
        self.ids[run] = run_id
        return run_id

    def _find(self, run: str) -> tuple[str, Any]:
        """The key of a run in this store, and the run, or None where nobody has made it."""
        body = self._opened[run].body
        key = f"{self._run_id(body['parent'])}/{body['key']}" if body["parent"] else body["key"]
        found = self._client.search_runs([self._experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return key, found[0] if found else None

    def _filled(self, text: str) -> str:
        return links.filled(text, self._experiment_id, self._known_id)

    def _known_id(self, run: str) -> str | None:
        """The id of a run, None where this store has none: a link does not make what it leads to."""
        if run not in self.ids and run in self._opened:
            _, found = self._find(run)
            return None if found is None else str(found.info.run_id)
        return self.ids.get(run)

    def _tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def _log(self, operation: Operation, run_id: str, *, look: bool) -> None:
        """Log the points that the run does not have yet.

        Of ``points`` one with another value at the same step is another point; elsewhere a step has one value.
        """
        points = _points(operation)
        if look:
            points = [p for p in points if not self._has(operation, run_id, p)]
        self._client.log_batch(run_id, metrics=points)
        for point in points:
            seen = self._seen.get((operation.run, point.key))
            if seen is not None:
                seen.setdefault(point.step, set()).add(written(point.value))

    def _has(self, operation: Operation, run_id: str, point: Any) -> bool:
        series = operation.run, point.key
        if series not in self._seen:
            there: dict[int, set[str]] = {}
            for old in self._client.get_metric_history(run_id, point.key):
                there.setdefault(old.step, set()).add(written(old.value))
            self._seen[series] = there
        values = self._seen[series].get(point.step, set())
        return written(point.value) in values if operation.kind == "points" else bool(values)


def _points(operation: Operation) -> Sequence[Any]:
    body, at_ms = operation.body, operation.time_ms
    if operation.kind == "series":
        return [Metric(body["name"], value, at_ms, step) for step, value in enumerate(body["values"])]
    return [Metric(name, value, at_ms, body["step"]) for name, value in body["values"].items()]


def written(value: float) -> str:
    """A value of a metric as text, equal for equal values, NaN and infinity too."""
    return repr(max(-MAX_FLOAT, min(MAX_FLOAT, value)) if value == value else value)


def _look_into(uri: str) -> None:
    """Open an SQLite database, which says at once what MLflow says after a hundred seconds."""
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///"))
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA schema_version")


def _is_refused(error: Exception) -> bool:
    """Whether trying again is of no use; what is not known to be so counts as an outage, which loses nothing."""
    if isinstance(error, MlflowException):
        return error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
    status = getattr(getattr(error, "response", None), "status_code", None)
    # A file that was removed since, an artifact folder of another machine, a file too large for the server.
    return isinstance(error, (FileNotFoundError, PermissionError)) or status in (400, 413)


def _is_away(error: Exception, uri: str) -> bool:
    """Whether a store that could not be reached at first may answer later."""
    if uri.startswith("sqlite"):
        return "locked" in str(error)
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in BUSY
    return isinstance(error, (OperationalError, OSError))


def _reason(error: Exception) -> str:
    """One short line; what went wrong stands at the end of what is said of connections."""
    fault = find_fault(error)
    if fault is not None and fault.kind in ("full", "read-only"):  # SQLAlchemy begins with other things
        return f"its disk is {fault.kind}"
    text = without_credentials(first_line(error, None))
    return text if len(text) <= 200 else f"{text[:80]} ... {text[-110:]}"
