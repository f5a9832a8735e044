"""Small disks of their own, which a test may fill."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class SmallDisk:
    """A file system of its own."""

    path: Path

    @property
    def free(self) -> int:
        state = os.statvfs(self.path)
        return state.f_bavail * state.f_frsize

    @property
    def _filler(self) -> Path:
        return self.path / "filler"

    def fill(self, leave: int) -> None:
        """Take what is free but so many bytes; called again it takes what has become free since."""
        with open(self._filler, "ab") as file, contextlib.suppress(OSError):
            more = self.free - leave
            if more >= 4096:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), more // 4096 * 4096)

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        """No more writing."""
        self._mount("-o", "remount,ro", str(self.path))

    @staticmethod
    def _mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], SmallDisk]]:
    """Makes a file system in memory of a size like ``3m``; skips the test where mounting is not permitted."""
    mounted: list[Path] = []

    def make(size: str) -> SmallDisk:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here ({done.stderr.strip()})")
        mounted.append(place)
        return SmallDisk(place)

    yield make
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=False)
