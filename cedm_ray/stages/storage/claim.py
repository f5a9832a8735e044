"""One driver for each run folder of a bucket: a claim that is renewed, and that ends when nobody renews it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cedm_ray.errors import UserError
from cedm_ray.stages.storage.bucket import (
    address,
    bucket_key,
    copy_id,
    listed,
    read_object,
    remove_object,
    write_object,
)
from cedm_ray.stages.storage.lock import in_words, this_driver

CLAIMS = "drivers"
"""Folder of a run in the bucket with one object for each driver that claims it."""
RENEW_S, EXPIRE_S = 20.0, 90.0


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def claimed(
    folder: Path, *, renew_s: float = RENEW_S, expire_s: float = EXPIRE_S, on_lost: Callable[[], None] = _interrupt
) -> Iterator[None]:
    """Hold a run folder of a bucket for this process; of any other folder nothing is done.

    A driver writes its claim and then looks for others: of two that start at once at least one sees the other, and none
    of them goes on unless it sees nobody. How old a claim is says the store's clock alone. A driver that is killed
    leaves a claim that expires; one that was held up for longer than that, and finds another in its place, ends itself.
    A claim from this very copy of the bucket counts for nothing: whoever made it no longer holds the copy's lock,
    which this process has.

    Args:
        folder: The run folder, of which this process holds the lock in its copy.
        renew_s: Seconds between renewals.
        expire_s: Seconds after which a claim that is not renewed counts for nothing.
        on_lost: Called in another thread when the folder belongs to somebody else (as Ctrl-C, when not given).

    Raises:
        UserError: If another driver holds it, with its host and process id.
    """
    if bucket_key(folder) is None:
        yield
        return
    claim = _Claim(folder, expire_s)
    claim.take()
    stopped = threading.Event()

    def renew() -> None:
        while not stopped.wait(renew_s):
            if not claim.renew():
                on_lost()
                return

    thread = threading.Thread(target=renew, name="claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        remove_object(claim.file)


class _Claim:
    def __init__(self, folder: Path, expire_s: float) -> None:
        self._folder, self._expire_s = folder / CLAIMS, expire_s
        self.file = self._folder / f"{uuid.uuid4().hex}.json"
        self._copy = copy_id(folder.parent)
        self._said = json.dumps({**this_driver(), "copy": self._copy}).encode()
        self._renewed_s = 0.0

    def take(self) -> None:
        self._write()
        other = self._other()
        if other is None:
            return
        remove_object(self.file)
        raise UserError(
            f"{address(self._folder.parent)} belongs to {in_words(_read(other))}; wait for it or end it first (the "
            f"claim of a search that was killed ends after {self._expire_s:g} s)"
        )

    def renew(self) -> bool:
        """Whether the folder is still this process'; a store that is away for a while changes nothing by itself."""
        late = _now_s() - self._renewed_s > self._expire_s
        try:
            self._write()
            return not (late and self._other() is not None)
        except Exception:  # whatever the store or its client says: it is tried again
            return True

    def _write(self) -> None:
        now_s = _now_s()
        write_object(self.file, self._said)
        self._renewed_s = now_s

    def _other(self) -> Path | None:
        """A claim of somebody else that counts; older ones are removed."""
        claims = listed(self._folder)
        mine = claims.pop(self.file.name, None)  # None: somebody found it too old, and removed it
        for name, info in sorted(claims.items()):
            young = mine is None or (mine.mtime_ns - info.mtime_ns) / 1e9 <= self._expire_s
            if young and _read(self._folder / name).get("copy") != self._copy:
                return self._folder / name
            remove_object(self._folder / name)
        return None


def _now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine sleeps


def _read(claim: Path) -> dict[str, Any]:
    """What a claim says; nothing where it is gone, or is none."""
    try:
        found = json.loads(read_object(claim) or b"")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
