"""A disk that is full or read-only, recognised in whatever was raised because of it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cedm_ray.errors import UserError

Kind = Literal["full", "quota", "read-only", "refused"]

_ERRNOS: dict[int | None, Kind] = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "quota",
    errno.EROFS: "read-only",
    errno.EACCES: "refused",
    errno.EPERM: "refused",
}
# What libraries say that pass no errno on (safetensors, Arrow, SQLite, NumPy, Ray), and what a traceback says, which is
# all that remains of an error in another process.
_TEXTS: tuple[tuple[Kind, str], ...] = (
    ("quota", r"Disk quota exceeded|\[errno 122\]"),
    ("full", r"No space left on device|\[errno 28\]|database or disk is full|\d+ requested and \d+ written"),
    ("full", r"OutOfDiskError"),
    ("read-only", r"Read-only file system|\[errno 30\]|attempt to write a readonly database"),
    ("refused", r"PermissionError: \[errno 13\]"),
)
_FILE = r"(?:No space left on device|Disk quota exceeded|Read-only file system|Permission denied): '(/[^'\n]+)'"


class StorageError(UserError):
    """A disk on which a search cannot write: one line with the path, what is needed, what is free and the way out."""


class DiskFaultError(Exception):
    """Something failed for a disk that is known, and the line for the user is still to be made."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"the disk is {fault.kind}: {fault.path or 'an unknown file'}")
        self.fault = fault


@dataclass(frozen=True)
class Fault:
    """A disk that refused to be written to."""

    kind: Kind
    path: Path | None = None
    """The file that could not be written, where it is known."""
    said: str | None = None
    """The line for the user, where whoever met the fault could make it."""

    def concerns(self, storage: Path) -> bool:
        """Whether the storage path may be meant; a file that is closed to the user may be anywhere."""
        if self.said is None and self.kind == "refused":
            return self.path is not None and self.path.is_relative_to(storage)
        return True


def find_fault(error: BaseException) -> Fault | None:
    """The disk that is behind an error, whatever it was wrapped in; None where there is none."""
    faults = [fault for each in _chain(error) if (fault := _fault(each)) is not None]
    # Whoever met it knows most; after that, a file's name says which disk it is.
    return min(faults, key=lambda fault: (fault.said is None, fault.path is None), default=None)


def fault_in_text(text: str) -> Fault | None:
    """The disk that a traceback's text tells of; None where it tells of none."""
    said = re.findall(rf"^.*\b{StorageError.__name__}\)?: (.+)$", text, re.MULTILINE)
    if said:
        return Fault("full", None, said[-1].strip())
    kind = next((kind for kind, words in _TEXTS if re.search(words, text, re.IGNORECASE)), None)
    file = re.search(_FILE, text, re.IGNORECASE)
    return None if kind is None else Fault(kind, None if file is None else Path(file[1]))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it: also what Ray raises a copy of, and what the workers of a training raised."""
    left, seen = [error], set[int]()
    while left:
        each = left.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        failures = getattr(each, "worker_failures", None)
        more = [each.__cause__, None if each.__suppress_context__ else each.__context__, getattr(each, "cause", None)]
        more += list(failures.values()) if isinstance(failures, Mapping) else []
        left += [one for one in more if isinstance(one, BaseException)]


def _fault(error: BaseException) -> Fault | None:
    if isinstance(error, DiskFaultError):
        return error.fault
    if isinstance(error, StorageError):  # one that comes out of a Ray task is printed as that task's traceback
        return fault_in_text(str(error)) if "\n" in str(error) else Fault("full", None, str(error))
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        file = str(error.filename)
        known = file.startswith("/") and "\n" not in file  # Ray Data puts a message there
        return Fault(_ERRNOS[error.errno], Path(file) if known else None)
    return fault_in_text(f"{type(error).__name__}: {error}")
