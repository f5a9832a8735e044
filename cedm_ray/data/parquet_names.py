"""What counts as Parquet by its name; without Arrow, which takes a while to import."""

import os
from collections.abc import Iterable
from pathlib import Path

from cedm_ray.data.images import SUFFIXES


def is_parquet(name: str) -> bool:
    """Whether a file of this name counts as Parquet; hidden ones do not."""
    return name.lower().endswith(".parquet") and not name.startswith(".")


def is_parquet_folder(files: Iterable[str]) -> bool:
    """Whether a folder counts as Parquet: ``*.parquet`` files and no images lie directly in it.

    Args:
        files: Names of the files directly in it, not of its sub-folders; hidden ones play no part.
    """
    shown = [name.lower() for name in files if not name.startswith(".")]
    return any(map(is_parquet, shown)) and not any(name.endswith(SUFFIXES) for name in shown)


def files_in(folder: Path) -> list[str]:
    """Names of the files directly in a local folder, sorted; none where it cannot be listed."""
    for _, _, files in os.walk(folder):
        return sorted(files)
    return []
