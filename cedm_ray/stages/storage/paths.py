"""Paths that processes in other folders are given."""

from __future__ import annotations

from pathlib import Path


def absolute(path: Path | None) -> Path | None:
    """The same file for a process in another folder."""
    return None if path is None else path.expanduser().absolute()
