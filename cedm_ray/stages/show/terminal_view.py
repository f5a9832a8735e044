"""The live view: one picture of a search that fits the terminal, made anew every second."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cedm_ray.stages.show.progress import TrialFacts, Work, duration, scoring_label

STYLES = {"training": "cyan", "scoring": "cyan", "complete": "green", "failed": "red", "stopped": "dim"}
HINT = "Ctrl-C ends the search at the next checkpoints"


@dataclass(frozen=True)
class Moment:
    """All that the view shows, at one time."""

    clock: str
    """Time since the start."""
    now_s: float
    """Seconds of the epoch."""
    stage: str = ""
    outlook: str = ""
    """What is known of the whole stage: what of the budget is spent, and what is left."""
    works: tuple[Work, ...] = ()
    trials: tuple[TrialFacts, ...] = ()
    """In the order in which they started."""
    notice: str = ""
    """What is to be known now: that the search is ending, and what it waits for."""


@dataclass(frozen=True)
class Row:
    """A line of the table; a trial, or a piece of work that belongs to none."""

    label: str
    state: str
    amount: str
    score: float | None = None
    left_s: float | None = None
    gpu: str = ""


COLUMNS = ("trial", "state", "done", "score", "left", "GPU")
ROOM = {"GPU": 90, "left": 64, "done": 44}
"""From how many columns of the terminal on a column of the table is shown."""


def view(moment: Moment, width: int, height: int) -> RenderableType:
    """The picture of a moment.

    Args:
        moment: What to show.
        width: Columns of the terminal.
        height: Lines of the terminal; one is left for the cursor.
    """
    head = [_line(f"{moment.clock} {moment.stage}", "bold", width)]
    if moment.outlook:
        head.append(_line(f"       {moment.outlook}", "", width))
    foot = [_line(moment.notice, "yellow", width)] if moment.notice else [_line(HINT, "dim", width)]
    room = height - 1 - len(head) - len(foot)
    rows = table_rows(moment)
    parts: list[RenderableType] = [*head]
    if rows and room >= 2:
        shown = rows[: room - 1] if len(rows) <= room - 1 else rows[: max(room - 2, 1)]
        metric = next((trial.metric for trial in moment.trials), "score")
        parts.append(_table(shown, metric, width))
        if len(shown) < len(rows) and room - 1 > len(shown):
            parts.append(_line(f"and {len(rows) - len(shown)} more", "dim", width))
    return Group(*parts, *foot)


def table_rows(moment: Moment) -> list[Row]:
    """What is at work first, then the trials that wait or are done, the best score first."""
    works = {work.label: work for work in moment.works}
    busy: list[Row] = []
    idle: list[Row] = []
    for trial in moment.trials:
        training, scoring = works.pop(trial.label, None), works.pop(scoring_label(trial.label), None)
        work = scoring or training
        if work is not None:
            state = "scoring" if scoring else "training"
            busy.append(Row(trial.label, state, work.amount, trial.score, work.left_s(moment.now_s), work.gpu))
        else:
            state = "starting" if trial.state == "running" else trial.state
            row = Row(trial.label, state, f"{trial.kimg:,} kimg", trial.score)
            (busy if trial.state == "running" else idle).append(row)
    others = [Row(each.label, "", each.amount, None, each.left_s(moment.now_s), each.gpu) for each in works.values()]
    return [*busy, *others, *sorted(idle, key=_rank)]


def _rank(row: Row) -> float:
    return row.score if row.score is not None and math.isfinite(row.score) else math.inf


def _table(rows: Sequence[Row], metric: str, width: int) -> Table:
    names = [name for name in COLUMNS if width >= ROOM.get(name, 0)]
    if not any(row.gpu for row in rows):
        names = [name for name in names if name != "GPU"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in names:
        right = name in ("done", "score", "left")
        table.add_column(
            {"score": metric, "trial": ""}.get(name, name),
            justify="right" if right else "left",
            no_wrap=True,
            overflow="ellipsis",
            max_width=max(8, width - 24) if name == "trial" else None,
        )
    for row in rows:
        table.add_row(*(_cells(row, names)))
    return table


def _cells(row: Row, names: Iterable[str]) -> Iterable[Text]:
    texts = {
        "trial": Text(row.label),
        "state": Text(row.state, STYLES.get(row.state, "")),
        "done": Text(row.amount),
        "score": Text("" if row.score is None else f"{row.score:.4g}"),
        "left": Text("" if row.left_s is None else duration(row.left_s)),
        "GPU": Text(row.gpu),
    }
    return (texts[name] for name in names)


def _line(text: str, style: str, width: int) -> Text:
    line = Text(text, style, no_wrap=True, overflow="ellipsis")
    line.truncate(max(1, width), overflow="ellipsis")
    return line
