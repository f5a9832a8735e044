"""One driver for each run folder: a second one is refused, and a killed one leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cedm_ray.errors import UserError
from cedm_ray.stages.storage.paths import LOCK_FILE
from cedm_ray.stages.storage.store import read_json


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; the system frees it when the process ends, however it ends.

    Args:
        folder: The run folder, which exists; on a shared file system that passes on ``flock`` (NFS 4 does).

    Raises:
        UserError: If another process holds it, with its host and process id, or if the file system has no locks.
    """
    # Not emptied on opening: what the owner has written there stays readable.
    with open(folder / LOCK_FILE, "a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = in_words(read_json(folder / LOCK_FILE))
            raise UserError(f"{folder} belongs to {owner}; wait for it or end it first") from None
        except OSError as error:
            raise UserError(
                f"{folder} cannot be locked ({error.strerror}); give a --storage-path on a file system with flock"
            ) from error
        handle.truncate(0)
        handle.write(json.dumps(this_driver()))
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)


def this_driver() -> dict[str, Any]:
    """What a driver says of itself where it holds a folder: its host, its process, and since when it does."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}


def in_words(owner: object) -> str:
    """What a driver has said of itself, for an error's line; whatever was read may be given."""
    if not isinstance(owner, dict) or not {"pid", "host", "since"} <= owner.keys():
        return "another search that runs"
    return f"the search of process {owner['pid']} on {owner['host']}, which runs since {owner['since']}"
