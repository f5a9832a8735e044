"""Files that appear whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file beside its place and move it there at the end; whoever reads sees the old file or the new one.

    Args:
        path: Where the file is to be; its folder must exist. An older file is replaced.

    Yields:
        Where to write it: a hidden name of this call's own, with the same ending. It is removed if an error is raised.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
