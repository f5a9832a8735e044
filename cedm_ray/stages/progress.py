"""What the terminal shows while a search runs."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.text import Text

TICK_S = 1.0
PLAIN_EVERY_S = 10.0


@dataclass(frozen=True)
class Work:
    """How far one piece of work is: ``done`` of ``total`` units since ``started_s`` (seconds of the epoch)."""

    label: str
    done: float
    total: float
    unit: str
    started_s: float
    started_done: float = 0.0

    def text(self, now_s: float) -> str:
        """For example ``C=17 96/200 kimg, 12 s left``."""
        said = f"{self.label} {self.done:,.0f}/{self.total:,.0f} {self.unit}".strip()
        made, spent = self.done - self.started_done, now_s - self.started_s
        if made > 0 and self.done < self.total:
            said += f", {duration((self.total - self.done) * spent / made)} left"
        return said


@contextmanager
def noise_to(log: Path, terminal: Terminal) -> Iterator[None]:
    """Send to a file what libraries and their processes print, while the terminal goes on showing our own lines.

    Done on file descriptors, because Ray's C++ core prints past Python's ``sys.stderr``.

    Args:
        log: File to add to.
        terminal: Keeps writing to where standard output went before, if that is where it writes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    ours = terminal.console.file is sys.stdout
    with open(log, "ab") as sink, os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as screen:
        if ours:
            terminal.console.file = screen
        try:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for old, number in zip(kept, (1, 2), strict=True):
                os.dup2(old, number)
                os.close(old)
            if ours:
                terminal.console.file = sys.stdout


def duration(seconds: float) -> str:
    """Seconds as ``42 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class WorkCounter:
    """One piece of work of this process, which counts itself and can be shown."""

    def __init__(self, label: str, total: float, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done, self._started_s = 0.0, time.time()

    def add(self, more: float) -> None:
        """So much more is done."""
        self._done += more

    def works(self) -> list[Work]:
        return [Work(self._label, self._done, self._total, self._unit, self._started_s)]


class WorkList(Protocol):
    """Where works in progress can be read."""

    def works(self) -> list[Work]: ...


class Terminal:
    """Lines of a search on the terminal: a moving status line where there is one, plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.started_s = time.monotonic()

    def line(self, text: str, style: str = "") -> None:
        """One line that stays, with the time since the start."""
        self.console.print(Text.assemble((f"{self._clock()} ", "dim"), (text, style)))

    def _clock(self) -> str:
        spent = int(time.monotonic() - self.started_s)
        return f"{spent // 60:3d}:{spent % 60:02d}"

    @contextmanager
    def stage(self, name: str, board: WorkList | None = None, outlook: Callable[[], str] = str) -> Iterator[None]:
        """Announce a stage and keep showing how far it is until the block ends.

        Args:
            name: What is being done.
            board: The board that the stage's processes write to (:mod:`cedm_ray.stages.board`).
            outlook: Gives what is known of the whole stage: what is done, what is left.
        """
        self.line(name, style="bold")
        stop = threading.Event()
        status = self.console.status("") if self.console.is_terminal else None

        def show() -> None:
            last_s = time.monotonic()
            while not stop.wait(TICK_S):
                works = board.works() if board is not None else []
                text = "; ".join(part for part in (outlook(), *(w.text(time.time()) for w in works)) if part)
                if status is not None:
                    status.update(Text(f"{self._clock()} {name}: {text}" if text else f"{self._clock()} {name}"))
                elif text and time.monotonic() - last_s >= PLAIN_EVERY_S:
                    last_s = time.monotonic()
                    self.line(f"  {text}")

        watcher = threading.Thread(target=show, daemon=True, name="progress")
        if status is not None:
            status.start()
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join(timeout=5)
            if status is not None:
                status.stop()
