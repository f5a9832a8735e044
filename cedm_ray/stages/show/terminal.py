"""What the terminal shows while a search runs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console

from cedm_ray.stages.show import progress
from cedm_ray.stages.show.progress import Facts, StageFacts, TrialFacts, WorkList
from cedm_ray.stages.show.screens import JsonScreen, LiveScreen, PlainScreen, Screen, json_line, standard_console
from cedm_ray.stages.show.stopping import Stopping
from cedm_ray.stages.show.terminal_view import Moment

Mode = Literal["live", "plain", "json"]
SCREENS: dict[Mode, Callable[[Console], Screen]] = {"live": LiveScreen, "plain": PlainScreen, "json": JsonScreen}
AGAIN = "Ctrl-C again stops now"
SHOW_CURSOR = "\x1b[?25h\r\n"


class Terminal:
    """Lines of a search that stay, and what moves below them: a live view on a terminal, plain lines elsewhere.

    Args:
        console: Where it is written.
        mode: The way of showing (None: live on a terminal, else plain).
        stopping: Whether the search is asked to end: it is said, and no stage starts any more.
    """

    def __init__(
        self, console: Console | None = None, mode: Mode | None = None, stopping: Stopping | None = None
    ) -> None:
        self.console = console or standard_console()
        if mode is None:
            mode = "live" if self.console.is_terminal and not self.console.is_dumb_terminal else "plain"
        self.mode = mode
        self.stopping = stopping or Stopping()
        self.started_s = time.monotonic()
        self._screen = SCREENS[mode](self.console)
        self._trials: dict[str, TrialFacts] = {}
        self._stage = ""
        self._board: WorkList | None = None
        self._outlook: Callable[[], str] = str
        self._turn = threading.RLock()
        """Held while the works of a stage are read, so that it does not end meanwhile."""
        self._showing, self._stop_told = False, False

    def line(self, text: str, style: str = "", facts: Facts | None = None) -> None:
        """One line that stays, with the time since the start.

        Args:
            text: For people.
            style: Of rich.
            facts: The same for programs, and for the table of trials.
        """
        self._remember(facts)
        self._screen.line(self._clock(), text, style, facts)

    def _remember(self, facts: Facts | None) -> None:
        if isinstance(facts, TrialFacts):
            self._trials[facts.label] = facts

    def tell(self, text: str, facts: Facts) -> None:
        """Something that programs and the table of trials hear, and that is no line for people."""
        self._remember(facts)
        if self.mode == "json":
            self._screen.line("", text, "", facts)

    def _clock(self) -> str:
        spent = int(time.monotonic() - self.started_s)
        return f"{spent // 60:3d}:{spent % 60:02d}"

    @contextmanager
    def stage(self, name: str, board: WorkList | None = None, outlook: Callable[[], str] = str) -> Iterator[None]:
        """Announce a stage and keep showing how far it is until the block ends.

        Args:
            name: What is being done.
            board: The board that the stage's processes write to (:mod:`cedm_ray.stages.cluster.board`).
            outlook: Gives what is known of the whole stage: what is done, what is left.

        Raises:
            Stopped: If the search was asked to end; no stage starts then.
        """
        self.stopping.check()
        self.line(name, "bold", StageFacts(name))
        with self.shown():
            self._begin(name, board, outlook)
            try:
                yield
            finally:
                self._begin("", None, str)

    def _begin(self, name: str, board: WorkList | None, outlook: Callable[[], str]) -> None:
        with self._turn:
            self._stage, self._board, self._outlook = name, board, outlook

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep showing what moves until the block ends; such blocks may lie in one another."""
        if self._showing:
            yield
            return
        self._showing = True
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,), daemon=True, name="terminal")
        self._screen.start()
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join(timeout=6)  # a board that does not answer is waited for 5 s
            self._screen.stop()
            self._showing = False

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(progress.TICK_S):
            self.tick()

    def tick(self) -> None:
        """Show how things are now."""
        with self._turn:
            works = tuple(self._board.works()) if self._board is not None else ()
            outlook = self._outlook()
            stage = self._stage
        notice = ""
        if self.stopping.asked:
            at_work = ", ".join(work.label for work in works) or stage or "what runs"
            notice = f"stopping: waits for {at_work} to come to a checkpoint; {AGAIN}"
            if not self._stop_told:
                self._stop_told = True
                self.line(notice, "yellow")
        trials = tuple(self._trials.values())
        self._screen.show(Moment(self._clock(), time.time(), stage, outlook, works, trials, notice))

    def leave(self, text: str, facts: Facts) -> None:
        """Say a last line on the way out, past every lock, and give the cursor back."""
        said = json_line(text, facts) if self.mode == "json" else f"{text}\n"
        cursor = SHOW_CURSOR if self.mode == "live" else ""
        os.write(self.console.file.fileno(), f"{cursor}{said}".encode())
