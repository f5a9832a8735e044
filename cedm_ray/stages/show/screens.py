"""Three ways of showing a search: a live view, plain lines, and JSON objects for programs."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Protocol

from rich.console import Console, ConsoleDimensions
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cedm_ray.stages.show.progress import Facts, ProgressFacts, Work
from cedm_ray.stages.show.terminal_view import Moment, view

TOLD_EVERY_S = 10.0


class ScreenConsole(Console):
    """A console whose size is that of the terminal that it writes to, wherever the standard streams go."""

    @property
    def size(self) -> ConsoleDimensions:
        try:
            width, height = os.get_terminal_size(self.file.fileno())
        except (OSError, ValueError, AttributeError):
            return super().size
        return ConsoleDimensions(width, height) if width and height else super().size

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size


def standard_console() -> ScreenConsole:
    """A console on standard output; in a notebook plain text, for a cell would keep all of a live view."""
    in_notebook = Console().is_jupyter
    return ScreenConsole(
        file=sys.stdout,
        highlight=False,
        soft_wrap=True,
        force_jupyter=False,
        force_terminal=False if in_notebook else None,
    )


class Screen(Protocol):
    """Shows a search."""

    def line(self, clock: str, text: str, style: str, facts: Facts | None) -> None:
        """A line that stays."""

    def start(self) -> None:
        """What moves is shown from now on."""

    def show(self, moment: Moment) -> None:
        """How things are now; called about once a second."""

    def stop(self) -> None:
        """Nothing moves any more."""


class LiveScreen:
    """Lines that stay scroll above a view that is redrawn in its place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    def line(self, clock: str, text: str, style: str, facts: Facts | None) -> None:
        self._console.print(_wrapped(clock, text, style), soft_wrap=False)

    def start(self) -> None:
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False,
            vertical_overflow="crop",
        )  # fmt: skip
        self._live.start()

    def show(self, moment: Moment) -> None:
        if self._live is not None:
            width, height = self._console.size
            self._live.update(view(moment, width, height), refresh=True)

    def stop(self) -> None:
        if self._live is not None:
            self._live.update(Text(""))
            self._live.stop()
            self._live = None


class PlainScreen:
    """Lines alone, one every few seconds for what moves."""

    def __init__(self, console: Console) -> None:
        self._console, self._told_s = console, 0.0

    def line(self, clock: str, text: str, style: str, facts: Facts | None) -> None:
        _print(self._console, clock, text, style)

    def start(self) -> None:
        self._told_s = time.monotonic()

    def show(self, moment: Moment) -> None:
        text = "; ".join(part for part in (moment.outlook, *(work.text(moment.now_s) for work in moment.works)) if part)
        if text and time.monotonic() - self._told_s >= TOLD_EVERY_S:
            self._told_s = time.monotonic()
            self.line(moment.clock, f"  {text}", "", None)

    def stop(self) -> None:
        """Nothing moved."""


class JsonScreen:
    """One JSON object a line: ``event``, ``time`` (ISO 8601), ``text``, and the fields of the facts."""

    def __init__(self, console: Console) -> None:
        self._console, self._told_s = console, 0.0

    def line(self, clock: str, text: str, style: str, facts: Facts | None) -> None:
        self._console.file.write(json_line(text, facts or Facts()))
        self._console.file.flush()

    def start(self) -> None:
        self._told_s = time.monotonic()

    def show(self, moment: Moment) -> None:
        if (moment.works or moment.outlook) and time.monotonic() - self._told_s >= TOLD_EVERY_S:
            self._told_s = time.monotonic()
            works = tuple(_work(work, moment.now_s) for work in moment.works)
            self.line(moment.clock, moment.outlook, "", ProgressFacts(moment.stage, works))

    def stop(self) -> None:
        """Nothing moved."""


def json_line(text: str, facts: Facts) -> str:
    """An event as it is written."""
    said = {"event": facts.event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "text": text.strip()}
    return json.dumps(_plain({**said, **asdict(facts)}), allow_nan=False) + "\n"


def _work(work: Work, now_s: float) -> dict[str, Any]:
    names = ("label", "done", "total", "unit", "gpu")
    return {**{name: getattr(work, name) for name in names}, "left_s": work.left_s(now_s)}


def _plain(value: Any) -> Any:
    """As JSON has it: what is no number is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _print(console: Console, clock: str, text: str, style: str) -> None:
    console.print(Text.assemble((f"{clock} ", "dim"), (text, style)))


def _wrapped(clock: str, text: str, style: str) -> Table:
    """A line whose further lines stand below its text."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    margin = len(text) - len(text.lstrip())
    grid.add_row(Text(clock + " " * margin, "dim"), Text(text.lstrip(), style))
    return grid
