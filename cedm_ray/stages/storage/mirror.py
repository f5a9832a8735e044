"""What the driver of a search writes as it goes, kept in the bucket: records, results, figures, the exported model."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cedm_ray.errors import first_line
from cedm_ray.report.read_run import RESULT_FILE
from cedm_ray.stages.storage import bucket
from cedm_ray.stages.storage.bucket_files import fetch_file, keep_file
from cedm_ray.stages.storage.claim import CLAIMS, claimed
from cedm_ray.stages.storage.paths import ARTIFACTS_FOLDER, DATABASE_FILE, LOCK_FILE, SPEEDS_FOLDER

PUSH_S = 5.0
COPY_FILE = "copy.json"
"""In a run's folder: which copy of the bucket its last driver had."""
SHARED = (ARTIFACTS_FOLDER, SPEEDS_FOLDER)
"""Folders beside the runs that the driver writes."""
LOCAL = ("ray", CLAIMS, LOCK_FILE, COPY_FILE)
"""What of a run's folder is of no use elsewhere: Tune's own records, and what says who runs."""
_PATHS_INSIDE = (".json", ".jsonl")

Stamp = tuple[int, int]


class Mirror:
    """The copy of a bucket in the folder of a driver, as far as that driver alone writes it; elsewhere does nothing.

    What is written here is in the bucket some seconds later. Entries of the store and checkpoints do not wait for
    that: their makers write them to the bucket themselves.

    Args:
        run: The run folder, in the copy.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.root = run, run.parent
        self._in_bucket = bucket.bucket_key(run) is not None
        self._pushed: dict[Path, Stamp] = {}
        self._here, self._there = f"{self.root}/", f"{bucket.address(self.root)}/"

    def fetch(self) -> None:
        """Bring here what the last driver has kept, unless that was one with this copy, which is at least as new.

        Raises:
            UserError: If the store does not answer.
        """
        if not self._in_bucket:
            return
        newest = bucket.read_object(self.run / COPY_FILE)
        if newest is None or newest == self._copy():
            return
        found = {self.run / name for name in bucket.listed(self.run) if not _is_local(name)}
        trials = self.root / "store" / "trials"
        found |= {trials / name for name in bucket.listed(trials) if _is_record(name)}
        for folder in (self.root / name for name in SHARED):
            found |= {folder / name for name in bucket.listed(folder)}
        if bucket.exists(self.root / DATABASE_FILE):
            found.add(self.root / DATABASE_FILE)
        with ThreadPoolExecutor(bucket.THREADS) as pool:
            list(pool.map(self._bring, sorted(found)))

    def own(self) -> None:
        """Note in the bucket that this copy is the newest from now on."""
        if self._in_bucket:
            bucket.write_object(self.run / COPY_FILE, self._copy())

    def push(self) -> int:
        """Write to the bucket what has changed here since the last time; returns the number of files.

        The result goes last: it says that everything else is whole.

        Raises:
            UserError: If the store does not answer, or refuses.
        """
        if not self._in_bucket:
            return 0
        result = self.run / RESULT_FILE
        is_done = result.is_file()  # asked before the others are listed: what it speaks of is among them then
        changed = {file: stamp for file in self._files() if (stamp := _stamp(file)) != self._pushed.get(file) and stamp}
        result_stamp = changed.pop(result, None)
        with ThreadPoolExecutor(bucket.THREADS) as pool:
            list(pool.map(self._send, changed))
        if is_done and result_stamp is not None:
            self._send(result)
            changed[result] = result_stamp
        self._pushed |= changed
        for file in [file for file in self._pushed if not file.is_file()]:
            bucket.remove_object(file)
            del self._pushed[file]
        return len(changed)

    @contextlib.contextmanager
    def driving(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Hold the run for this process, begin with what the last driver has kept, and keep what this one writes.

        Args:
            tell: Shows a line.

        Raises:
            UserError: If another driver holds it, or the store does not answer.
        """
        with claimed(self.run):
            self.fetch()
            self.own()
            with self.pushing(tell):
                yield

    @contextlib.contextmanager
    def pushing(self, tell: Callable[[str], None], every_s: float = PUSH_S) -> Iterator[None]:
        """Write to the bucket every few seconds and at the end, whatever happens; an outage is told once."""
        stopped, told = threading.Event(), False

        def work() -> None:
            nonlocal told
            while not stopped.wait(every_s):
                try:
                    self.push()
                    told = False
                except Exception as error:  # whatever the store or its client says: it is tried again
                    if not told:
                        tell(f"{first_line(error, None)}; it is tried again")
                    told = True

        if not self._in_bucket:
            yield
            return
        thread = threading.Thread(target=work, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            self.push()

    def _copy(self) -> bytes:
        return json.dumps(bucket.copy_id(self.root)).encode()

    def _files(self) -> Iterator[Path]:
        for file in _below(self.run):
            if not _is_local(file.relative_to(self.run).as_posix()):
                yield file
        for name in SHARED:
            yield from _below(self.root / name)
        trials = self.root / "store" / "trials"
        yield from (file for file in trials.glob("*/*.json") if _is_record(file.relative_to(trials).as_posix()))
        if (self.root / DATABASE_FILE).is_file():
            yield self.root / DATABASE_FILE

    def _send(self, file: Path) -> None:
        if file.name == DATABASE_FILE:
            with tempfile.TemporaryDirectory() as folder:
                _back_up(file, Path(folder) / DATABASE_FILE)
                bucket.write_object(file, (Path(folder) / DATABASE_FILE).read_bytes())
        elif file.suffix in _PATHS_INSIDE:  # paths are the bucket's there, for whoever reads them
            bucket.write_object(file, file.read_text(encoding="utf-8").replace(self._here, self._there).encode())
        else:
            keep_file(file)

    def _bring(self, file: Path) -> None:
        fetch_file(file)
        if file.suffix in _PATHS_INSIDE:
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(self._there, self._here), encoding="utf-8")


def _below(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.is_file() and not any(part.startswith(".") for part in parts):
            yield file


def _is_record(name: str) -> bool:
    """Whether a path below the trials is a JSON file of one of them, and not one that is being written."""
    folder, _, file = name.partition("/")
    return bool(folder) and file.endswith(".json") and "/" not in file and not file.startswith(".")


def _is_local(name: str) -> bool:
    return name.split("/")[0] in LOCAL


def _stamp(file: Path) -> Stamp | None:
    try:
        found = os.stat(file)
    except FileNotFoundError:  # removed in the meantime
        return None
    return found.st_size, found.st_mtime_ns


def _back_up(file: Path, to: Path) -> None:
    """A copy of an SQLite database that is written to meanwhile, as it was at one moment."""
    with contextlib.closing(sqlite3.connect(file)) as live, contextlib.closing(sqlite3.connect(to)) as copy:
        live.backup(copy)
