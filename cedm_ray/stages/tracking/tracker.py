"""MLflow, written to by the driver alone: one parent run per search, one child run per trial, none doubled.

What is to be written goes through an outbox (:mod:`cedm_ray.stages.tracking.outbox`): a server that is away delays it,
and nothing else. Runs are called by our own keys; MLflow's ids are found when something is delivered.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cedm_ray.addresses import without_credentials
from cedm_ray.stages.storage.store import key_of
from cedm_ray.stages.tracking import links
from cedm_ray.stages.tracking.delivery import Delivery, written
from cedm_ray.stages.tracking.outbox import OUTBOX_FILE, Outbox

MAX_PARAM = 500
UI_PORT = 5000
START_WAIT_S = 10.0
CLOSE_WAIT_S = 60.0
_LOG = logging.getLogger(__name__)


def ui_command(uri: str) -> str:
    """What opens the MLflow UI on this tracking store: a server's address, or the command that starts one.

    The command is fit for pasting into a shell; a name and a password in an address are left out.
    """
    if uri.startswith(("http://", "https://")):
        return without_credentials(uri)
    program = Path(sys.executable).with_name("mlflow")
    with contextlib.suppress(ValueError):
        program = program.relative_to(Path.cwd())
    # One worker and no job runner: answers in seconds, where the default takes most of a minute on two cores.
    return (
        f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {program} server --workers 1 --host 127.0.0.1 --port {UI_PORT} "
        f"--backend-store-uri '{without_credentials(uri)}'"
    )


class Tracker:
    """One search in MLflow.

    Every method returns as soon as the operation is on disk; a thread delivers it.

    Args:
        uri: Tracking URI; the database is made on first use.
        experiment: Name of the experiment; made if it does not exist.
        artifacts: Absolute folder for the artifacts of a new experiment (None: where the server keeps them).
        folder: Folder of the search, which keeps what MLflow does not have yet; what an earlier process left there is
            delivered (None: it is kept until this process ends).
        say: Hears one line when MLflow stops answering and one when it answers again.

    Raises:
        UserError: If the tracking store can never answer; a server that is down, or a database that is locked, may.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifacts: Path | None,
        folder: Path | None = None,
        say: Callable[[str], None] = _LOG.warning,
    ) -> None:
        self._delivery = Delivery(uri, experiment, artifacts)
        self._delivery.first_connect()
        if folder is None:
            self._scratch = TemporaryDirectory(prefix="cedm_ray-")
            folder = Path(self._scratch.name)
        self._say, self.uri, self.parent_key = say, without_credentials(uri), ""
        """``parent_key`` names the search's own run, in the other methods and in links; empty before :meth:`start`."""
        store = key_of({"uri": uri, "experiment": experiment})
        self._outbox = Outbox(folder / OUTBOX_FILE, store, self._delivery.send, say)
        self._told: set[Hashable] = set()
        self._open_now: set[str] = set()
        self._said: dict[tuple[str, str], Any] = {}  # what was last said of a run, by kind
        journal = self._outbox.journal
        for number, operation in sorted(journal.operations.items()):
            self._delivery.recall(operation, journal.receipts.get(number))
            if number not in journal.elsewhere:
                self._told.update(_marks(operation.kind, operation.run, operation.body))
        self._outbox.start()
        atexit.register(self.close)

    def start(self, key: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
        """Open the parent run of a search, or go on with it; returns the key, which names it in the other methods.

        Waits a while for MLflow's id of it (:meth:`run_id`).
        """
        self.parent_key = key
        self._open(key, {"parent": None, "key": key, "name": name}, params, tags)
        self._outbox.wait_for(lambda: key in self._delivery.ids, START_WAIT_S)
        return key

    def child(self, key: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
        """Open the child run of a trial, or go on with it; returns what names it in the other methods."""
        run = f"{self.parent_key}/{key}"
        self._open(run, {"parent": self.parent_key, "key": key, "name": name}, params, tags)
        return run

    def run_id(self, run: str) -> str | None:
        """MLflow's id of a run, or None while MLflow has not said it."""
        return self._delivery.ids.get(run)

    def known(self, key: str) -> str | None:
        """What names the child run of this key, as :meth:`child` would return it; None where nobody has opened it."""
        run = f"{self.parent_key}/{key}"
        return run if run in self._open_now or self._delivery.knows(run) else None

    def page(self, run: str) -> str | None:
        """Address of a run's page, on the server that :func:`ui_command` speaks of; None while it is not known."""
        run_id, experiment = self.run_id(run), self._delivery.experiment_id
        if run_id is None or experiment is None:
            return None
        root = self.uri.rstrip("/") if self.uri.startswith("http") else f"http://127.0.0.1:{UI_PORT}"
        return f"{root}/{links.filled(links.page(run), experiment, lambda _: run_id)}"

    def _open(self, run: str, body: dict[str, Any], params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        if run in self._open_now:
            self._tag(run, tags)
            return
        shortened = {name: value[:MAX_PARAM] for name, value in _texts(params).items()}
        self._outbox.put("open", run, {**body, "params": shortened, "tags": _texts(tags)})
        self._open_now.add(run)

    def metrics(self, run: str, values: Mapping[str, float], kimg: int) -> None:
        """Log metrics at a number of kimg, once: the second time the same kimg is left out."""
        self._once("metrics", run, {"values": {**_floats(values), "kimg": float(kimg)}, "step": kimg})

    def points(self, run: str, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step of their own; a value that the run has at this step already is left out."""
        marks = {name: ("points", run, name, step, written(value)) for name, value in _floats(values).items()}
        new = {name: float(values[name]) for name, mark in marks.items() if mark not in self._told}
        if new:
            self._once("points", run, {"values": new, "step": step})

    def series(self, run: str, name: str, values: Sequence[float]) -> None:
        """Log one metric at the steps 0, 1, ..., once: where the run has it already, it is left out."""
        if values:
            self._once("series", run, {"name": name, "values": [float(value) for value in values]})

    def _once(self, kind: str, run: str, body: Mapping[str, Any]) -> None:
        marks = set(_marks(kind, run, body))
        if not marks <= self._told:
            self._outbox.put(kind, run, body)
            self._told |= marks

    def artifact(self, run: str, path: Path, folder: str | None = None) -> None:
        """Add a file to a run, as the file is when it is delivered."""
        self._outbox.put("artifact", run, {"path": str(path.absolute()), "folder": folder})

    def end(self, run: str, state: str, tags: Mapping[str, Any] | None = None) -> None:
        """Close a run; ``state`` is kept as a tag and decides MLflow's own status."""
        status = {"failed": "FAILED", "interrupted": "KILLED"}.get(state, "FINISHED")
        told = _texts({"state": state, **(tags or {})})
        self._outbox.put("end", run, {"status": status, "tags": told})

    def describe(self, run: str, text: str) -> None:
        """The description that MLflow shows on the run's page: Markdown, with addresses from :mod:`.links`."""
        self._say_last("note", run, {"text": text})

    def view(self, name: str, view: Mapping[str, Any]) -> None:
        """Keep a view of the experiment's runs, in the form of MLflow's own shared views, for :func:`.links.view`."""
        self._say_last("view", self.parent_key, {"name": name, "view": view})

    def _say_last(self, kind: str, run: str, body: Mapping[str, Any]) -> None:
        """Of these the last one counts; what says the same as the one before is left out."""
        if self._said.get((kind, run)) != body:
            self._said[kind, run] = body
            self._outbox.put(kind, run, body)

    def _tag(self, run: str, tags: Mapping[str, Any]) -> None:
        if _texts(tags):
            self._outbox.put("tags", run, {"tags": _texts(tags)})

    def close(self, timeout_s: float = CLOSE_WAIT_S) -> int:
        """Wait until MLflow has everything, at most so long, and end; returns the number of operations that are left.

        They stay in the search's folder, and the next tracker on it delivers them.
        """
        atexit.unregister(self.close)
        left = self._outbox.close(timeout_s)
        if left:
            self._say(f"MLflow has not got {left} operations; {self._outbox.file} keeps them for the next run")
        return left


def _marks(kind: str, run: str, body: Mapping[str, Any]) -> Iterator[Hashable]:
    """What of an operation is not to be logged a second time."""
    if kind == "metrics":
        yield "metrics", run, body["step"]
    elif kind == "series":
        yield "series", run, body["name"]
    elif kind == "points":
        for name, value in body["values"].items():
            yield "points", run, name, body["step"], written(value)


def _floats(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items() if value is not None}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, for example ``temi.gamma``."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out.update(flat(value, f"{prefix}{name}."))
        else:
            out[f"{prefix}{name}"] = value
    return out
