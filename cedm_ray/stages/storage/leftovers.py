"""Unfinished entries of the store: what a process that was killed had written so far, and nobody will finish."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

OLD_S = 24 * 3600.0
"""Another search may be making an entry of the same store: one into which nothing was written for so long is over."""
_SCRATCH = re.compile(r"\.[^/]+\.[0-9a-f]{32}")


def remove_leftovers(store: Path, old_s: float = OLD_S) -> tuple[int, int]:
    """Remove scratch folders and files of a store that are of no use to anybody any more.

    Args:
        store: Folder of the store, with one folder for each kind of entry.
        old_s: Seconds without a change after which a folder counts as left.

    Returns:
        How many were removed, and how many bytes they held.
    """
    number = size = 0
    for path in sorted(store.glob("*/.*")):
        if not _SCRATCH.fullmatch(path.name):
            continue
        found = list(_below(path))
        if not found or time.time() - max(each.st_mtime for each in found) <= old_s:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        number, size = number + 1, size + sum(each.st_size for each in found)
    return number, size


def _below(path: Path) -> Iterator[os.stat_result]:
    """A folder or file and all that it holds, but for what goes meanwhile."""
    for each in (path, *path.rglob("*")):
        try:
            yield each.lstat()
        except FileNotFoundError:
            continue
