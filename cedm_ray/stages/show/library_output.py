"""What libraries print goes to a log; the terminal shows our own lines alone."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from rich.console import Console


@contextmanager
def output_to(log: Path, console: Console) -> Iterator[None]:
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
    with open(log, "ab") as sink, _spared_output() as screen:
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


@contextmanager
def _spared_output() -> Iterator[TextIO]:
    """Where standard output goes, for use while its descriptor leads elsewhere.

    The streams of a notebook's kernel lead to its cells past the descriptors: they are spared, and what is printed
    meanwhile goes to the descriptors, by streams that are not closed, since a library's logger may have kept one.
    """
    if _writes_to_descriptor(sys.stdout):
        with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as screen:
            yield screen
        return
    cell, out, err = sys.stdout, _stream(1), _stream(2)
    with _loggers_led({cell: out, sys.stderr: err}), redirect_stdout(out), redirect_stderr(err):
        yield cell


@contextmanager
def _loggers_led(streams: Mapping[TextIO, TextIO]) -> Iterator[None]:
    """Loggers that write to one stream of these pairs write to the other meanwhile, as does Ray's, which keeps the
    standard error that it has met first."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    # A handler without a stream of its own looks up standard error at each message.
    led = [(handler, handler.stream) for handler in handlers if vars(handler).get("stream") in streams]
    for handler, stream in led:
        handler.setStream(streams[stream])
    try:
        yield
    finally:
        for handler, stream in led:
            handler.setStream(stream)


def _writes_to_descriptor(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, ValueError):
        return False


def _stream(number: int) -> TextIO:
    return open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def _flush() -> None:
    """Write what is left to the log; where its disk is full, it is dropped."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), number)
            stream.flush()
