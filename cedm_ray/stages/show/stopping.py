"""How a search is asked to end: once and it ends at the next checkpoints, twice and it ends now."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C has ended."""
TERM_GRACE_S = 15.0
"""What SIGTERM leaves for the next checkpoint: with NOW_S within the 30 seconds after which batch systems kill."""
NOW_S = 10.0
"""What the second request leaves for closing; then the process ends as it is, which is as good for the next one."""


class Stopped(KeyboardInterrupt):
    """The search was asked to end, and has come to a place from which it can go on."""


class Stopping:
    """Whether a search has been asked to end; anyone may look, from any thread."""

    def __init__(self) -> None:
        self._asked = False  # no lock: it is set by a signal's handler, whatever is being done then

    @property
    def asked(self) -> bool:
        return self._asked

    def ask(self) -> None:
        """Start nothing new, and end what runs at its next checkpoint."""
        self._asked = True

    def check(self) -> None:
        """Come here before anything new is started.

        Raises:
            Stopped: If the search was asked to end.
        """
        if self.asked:
            raise Stopped


class Signals:
    """SIGINT and SIGTERM as requests to end.

    SIGINT (Ctrl-C) asks; a second one raises KeyboardInterrupt in the main thread, and what has not ended ``NOW_S``
    later, or by a third one, ends as it is. SIGTERM (a batch system, a job that is stopped) asks as the first SIGINT
    does, and is its own second one after ``TERM_GRACE_S``.

    Args:
        stopping: Is asked.
        last_words: Called before the process ends as it is.
    """

    def __init__(self, stopping: Stopping, last_words: Callable[[], None] = lambda: None) -> None:
        self._stopping, self._last_words = stopping, last_words
        self._now = False
        self._timers: list[threading.Timer] = []

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle them until the block ends; in the main thread only."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        try:
            yield
        finally:
            for timer in self._timers:
                timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals, again where a library has taken them meanwhile (Ray takes SIGTERM when it starts)."""
        signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGTERM, self._terminate)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._stopping.asked:
            self._stopping.ask()
            return
        if self._now:
            self._end()
        self._now = True
        self._later(NOW_S, self._end)
        raise KeyboardInterrupt

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._stopping.ask()
        # To the main thread itself: it may be waiting in the system, and would not hear of it.
        self._later(TERM_GRACE_S, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))

    def _end(self) -> None:
        self._last_words()
        os._exit(INTERRUPTED)

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, do)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()
