"""What is said of a disk that cannot be written: one line with its path, the size needed, what is free, the way out."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cedm_ray.stages.storage.disk_faults import Fault, StorageError, find_fault

SPARE_BYTES = 2**20
"""Left free beside a checkpoint, for the records of the trial and the lists of its checkpoints."""


def bytes_in_words(size: float) -> str:
    """Bytes in words, in decimal units, as disks are sold."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 1e3:,.0f} kB"


@dataclass(frozen=True)
class Need:
    """What is to be written."""

    what: str
    size: int
    """About, in bytes."""


@dataclass(frozen=True)
class Disk:
    """A folder on a disk, as the user knows it."""

    name: str
    folder: Path
    other: str = ""
    """What may be done beside making room."""

    @classmethod
    def storage(cls, path: Path) -> Disk:
        return cls(f"storage {path}", path, " or give another --storage-path")

    @classmethod
    def temporary(cls, path: Path) -> Disk:
        return cls(f"folder for temporary files {path} on {socket.gethostname()}", path, " or set TMPDIR to another")

    @property
    def free(self) -> int:
        """Bytes that this user may still write."""
        folder = self.folder.absolute()
        return shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.is_dir())).free

    def error(self, fault: Fault, need: Need) -> StorageError:
        """The line for the user."""
        if fault.kind == "read-only":
            said = f"is read-only: {need.what} cannot be written; make it writable{self.other}"
        elif fault.kind == "refused":
            said = (
                f"cannot be written: {fault.path or self.folder} is closed to this user; see to its rights{self.other}"
            )
        else:
            state = "is full" if fault.kind == "full" else "has reached its quota"
            said = f"{state}: {need.what} needs {self._short(need, fault)}; make room{self.other}"
        return StorageError(f"the {self.name} {said}; the same command goes on")

    def _short(self, need: Need, fault: Fault) -> str:
        size, free = bytes_in_words(need.size), bytes_in_words(self.free)
        if fault.kind == "quota":  # of which the file system's free space says nothing
            return f"about {size}"
        # More may be free than it was: what was half written has been removed since.
        return f"about {size}, {free} are free" if self.free < need.size else f"more than the {free} that are free"

    def check(self, need: Need) -> None:
        """Refuse to begin what could not be kept.

        Raises:
            StorageError: If there is not so much room.
        """
        if self.free < need.size:
            raise self.error(Fault("full"), need)


@contextmanager
def told_clearly(storage: Path, need: Callable[[], Need]) -> Iterator[None]:
    """Turn whatever is raised because a disk cannot be written into the line for the user.

    Args:
        storage: The storage path; a fault of which no file is known is taken to be its own.
        need: Says what is still to be written; asked when it is wanted.

    Raises:
        StorageError: Instead of what the block raised, where a disk is behind it.
    """
    try:
        yield
    except Exception as error:
        fault = find_fault(error)
        if fault is None or not fault.concerns(storage):
            raise
        if fault.said is not None:
            raise StorageError(fault.said) from error
        disk = Disk.storage(storage)
        if fault.path is not None and not fault.path.is_relative_to(storage):
            disk = Disk(f"folder {fault.path.parent} on {socket.gethostname()}", fault.path.parent)
        raise disk.error(fault, need()) from error


@contextmanager
def written_to(disk: Disk, need: Need) -> Iterator[None]:
    """Check for room before something is written to a disk, and say clearly that it failed.

    Raises:
        StorageError: If the disk has not so much room or cannot be written.
    """
    disk.check(need)
    try:
        yield
    except Exception as error:
        fault = find_fault(error)
        if fault is None or not fault.concerns(disk.folder):
            raise
        raise disk.error(fault, need) from error
