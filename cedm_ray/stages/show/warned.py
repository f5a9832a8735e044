"""What the store warns of, on the terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from cedm_ray.stages.show.terminal import Terminal
from cedm_ray.stages.storage import store


class _Lines(logging.Handler):
    """Each record is a line that stays."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self._terminal.line(f"  {record.getMessage()}", style="yellow")


@contextmanager
def warned(terminal: Terminal) -> Iterator[None]:
    """Tell of what is set aside while the block runs: what is printed otherwise ends in the log file.

    Args:
        terminal: Where it is told.
    """
    logger, lines = logging.getLogger(store.__name__), _Lines(terminal)
    logger.addHandler(lines)
    try:
        yield
    finally:
        logger.removeHandler(lines)
