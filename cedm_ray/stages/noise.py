"""What libraries print goes to a log; the terminal shows our own lines alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console


@contextmanager
def noise_to(log: Path, console: Console) -> Iterator[None]:
    """Send to a file what libraries and their processes print, while the terminal goes on showing our own lines.

    Done on file descriptors, because Ray's C++ core prints past Python's ``sys.stderr``.

    Args:
        log: File to add to.
        console: Keeps writing to where standard output went before, if that is where it writes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    ours = console.file is sys.stdout
    with open(log, "ab") as sink, os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as screen:
        if ours:
            console.file = screen
        try:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            yield
        finally:
            _flush()
            for old, number in zip(kept, (1, 2), strict=True):
                os.dup2(old, number)
                os.close(old)
            if ours:
                console.file = sys.stdout


def _flush() -> None:
    """Write what is left to the log; where its disk is full, it is dropped."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), number)
            stream.flush()
