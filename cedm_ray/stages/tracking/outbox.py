"""Operations for a server that may be away: kept in order in a journal, delivered by a thread when it answers."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OUTBOX_FILE = "mlflow-outbox.jsonl"
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0


class OutageError(Exception):
    """The server does not answer; the operation is tried again later, as it may or may not have arrived."""


class RefusedError(Exception):
    """The server answers and will never take this operation."""


@dataclass(frozen=True)
class Operation:
    """One thing to be written, by the driver's own name of the run."""

    number: int
    kind: str
    run: str
    time_ms: int
    """When it was put, in milliseconds of the epoch."""
    body: Mapping[str, Any]


@dataclass
class Journal:
    """What a journal's file says: lines ``{"store": ...}``, operations, and ``{"done": number, ...}``."""

    operations: dict[int, Operation] = field(default_factory=dict)
    receipts: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """What was said of the operations that the newest store has."""
    elsewhere: set[int] = field(default_factory=set)
    """Operations that went to another store than the newest one."""
    store: str | None = None
    torn: bool = False
    """Whether the last line has no end: who wrote it was killed."""

    def change_store(self, store: str) -> None:
        """What is delivered from now on goes to this store."""
        if self.store not in (None, store):
            self.elsewhere |= set(self.receipts)
            self.receipts = {}
        self.store = store

    def waiting(self) -> list[Operation]:
        """The operations that no store is known to have, in their order."""
        return [op for n, op in sorted(self.operations.items()) if n not in self.receipts and n not in self.elsewhere]


def read_journal(file: Path) -> Journal:
    """What a journal holds; a missing file is an empty one, and lines that are torn count for nothing."""
    found = Journal()
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return found
    found.torn = content[-1:] not in (b"", b"\n")
    for line in content.split(b"\n"):
        try:
            entry = json.loads(line)
            if "store" in entry:
                found.change_store(entry["store"])
            elif "done" in entry:
                found.receipts[int(entry["done"])] = entry
            else:
                found.operations[int(entry["number"])] = Operation(**entry)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return found


class Outbox:
    """Delivers operations in their order, each until it has arrived or is refused.

    Args:
        file: The journal (JSON lines); what an earlier process left in it is delivered first.
        store: Name of the store that is delivered to; what another store has is not sent again.
        send: Delivers one operation, in the outbox's own thread. Its second argument says whether the operation may
            have arrived already: it was tried, or an earlier process may have. Returns what is to be kept with the
            receipt. Raises :class:`OutageError` to be called again later, :class:`RefusedError` to have it set aside.
        say: Hears one line when delivery stops, one when it goes on, and one for each operation that is refused.
    """

    def __init__(
        self,
        file: Path,
        store: str,
        send: Callable[[Operation, bool], Mapping[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        self.file, self._send, self._say = file, send, say
        self.journal = read_journal(file)
        self._waiting = deque(self.journal.waiting())
        self._unsure = {op.number for op in self._waiting}
        self._next = max(self.journal.operations, default=0) + 1
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        if self.journal.torn:
            os.write(self._descriptor, b"\n")  # so that the next line is whole
        self._changed, self._hurry = threading.Condition(), threading.Event()
        self.down, self._closed = False, False
        if self.journal.store != store:
            self._write({"store": store})
            self.journal.change_store(store)
        self._thread = threading.Thread(target=self._deliver, daemon=True, name="outbox")

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def put(self, kind: str, run: str, body: Mapping[str, Any]) -> Operation:
        """Keep an operation; it is on disk when this returns, and is delivered later.

        Raises:
            OSError: If the journal cannot be written; it is as it was then.
        """
        with self._changed:
            if self._closed:
                raise ValueError(f"{self.file} is closed; {kind} of {run} cannot be put into it")
            operation = Operation(self._next, kind, run, int(time.time() * 1000), body)
            self._write(asdict(operation), sync=True)
            self._next += 1
            self._waiting.append(operation)
            self._changed.notify_all()
        return operation

    def _write(self, entry: Mapping[str, Any], *, sync: bool = False) -> None:
        """Append one line, all of it or nothing."""
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
            if sync:
                os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, end)
            raise

    def flush(self, timeout_s: float) -> int:
        """Wait until all is delivered, at most so long; returns the number of operations that are left."""
        self._hurry.set()  # whoever waits wants it tried now, not at the end of a long pause
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, timeout_s)
            return len(self._waiting)

    def wait_for(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for what a delivery brings, at most so long, and not while the server is away."""
        with self._changed:
            self._changed.wait_for(lambda: ready() or self.down or not self._waiting, timeout_s)
            return ready()

    def close(self, timeout_s: float) -> int:
        """As :meth:`flush`, and end; what is left stays in the journal."""
        left = self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._hurry.set()
        return left

    def _deliver(self) -> None:
        pause_s = FIRST_RETRY_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    os.close(self._descriptor)
                    return
                operation = self._waiting[0]
            try:
                receipt = dict(self._send(operation, operation.number in self._unsure))
            except OutageError as outage:
                self._unsure.add(operation.number)
                self._stopped(outage)
                if self._hurry.wait(pause_s):
                    self._hurry.clear()
                    pause_s = FIRST_RETRY_S / 2
                pause_s = min(2 * pause_s, LAST_RETRY_S)
                continue
            except RefusedError as refused:
                receipt = {"refused": str(refused)}
                self._say(f"MLflow refuses {operation.kind} of {operation.run}: {refused}")
            pause_s = FIRST_RETRY_S
            self._went_on()
            self._arrived(operation, receipt)

    def _stopped(self, outage: OutageError) -> None:
        with self._changed:
            news, self.down = not self.down, True
            self._changed.notify_all()
        if news:
            self._say(f"MLflow does not answer ({outage}); what is for it is kept in {self.file}")

    def _went_on(self) -> None:
        with self._changed:
            news, self.down, count = self.down, False, len(self._waiting)
        if news:
            self._say(f"MLflow answers again; {count} waiting operations are delivered")

    def _arrived(self, operation: Operation, receipt: Mapping[str, Any]) -> None:
        with self._changed:
            if self._closed:  # another process may own the journal by now; it finds out that this has arrived
                return
            try:
                # Not forced to disk: a receipt that is lost costs a look at what the server has.
                self._write({"done": operation.number, **receipt})
            except OSError as error:
                self._say(f"{self.file} cannot be written ({error.strerror}): what has arrived is looked for again")
            self._waiting.popleft()
            self._changed.notify_all()
