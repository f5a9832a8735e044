"""Groupings beside each other at equal C, over the trainings of one search or of several."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from cedm_ray.errors import UserError
from cedm_ray.report.rows import metric_title
from cedm_ray.report.run import Run
from cedm_ray.report.trial import Trial

_ORDER = ("none", "labels", "superclasses", "clip", "kmeans", "temi", "file")
_WIDTH = 80


@dataclass(frozen=True)
class Cell:
    """Score of a grouping at one C."""

    score: float
    """The mean over trainings that differ in their seed alone."""
    std: float | None
    """Their standard deviation, None for one."""
    count: int

    def __str__(self) -> str:
        return f"{self.score:.4g}" if self.std is None else f"{self.score:.4g} +- {self.std:.2g} ({self.count})"


@dataclass(frozen=True)
class Groupings:
    """Scores by grouping and C, all of the same images, kimg and number of generated images."""

    metric: str
    num_images: int
    total_kimg: int
    cells: Mapping[str, Mapping[int, Cell]]
    """By grouping, then by C."""

    @property
    def clusters(self) -> list[int]:
        return sorted({clusters for row in self.cells.values() for clusters in row})

    @property
    def title(self) -> str:
        """What stands in the cells."""
        return f"{metric_title(self.metric, self.num_images)} at {self.total_kimg:,} kimg by grouping and C"


def compare_groupings(runs: Sequence[Run]) -> Groupings:
    """The complete trainings of some searches, by grouping and C.

    A training that several searches share counts once. Where other settings than the seed differ, the best ones count.

    Args:
        runs: At least one; the others are refused where they were scored on other terms than the first.

    Raises:
        UserError: Naming the first fact that differs.
    """
    first = runs[0]
    for other in runs[1:]:
        _require_same_terms(first, other)
    scores: dict[tuple[str, int], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for trial, score in (pair for run in runs for pair in _complete(run)):
        settings = json.dumps({k: v for k, v in trial.params.items() if k != "train_seed"}, sort_keys=True)
        scores[trial.grouping, trial.num_clusters][settings][trial.key] = score
    cells: dict[str, dict[int, Cell]] = {}
    for name in sorted({grouping for grouping, _ in scores}, key=_place):
        own = sorted((clusters, found) for (grouping, clusters), found in scores.items() if grouping == name)
        cells[name] = {clusters: _cell(found) for clusters, found in own}
    return Groupings(first.metric, first.num_images, first.total_kimg, cells)


def _complete(run: Run) -> Iterator[tuple[Trial, float]]:
    for trial in run.trials:
        score = run.score_at_budget(trial)
        if score is not None:
            yield trial, score


def _cell(by_settings: Mapping[str, Mapping[str, float]]) -> Cell:
    found = [list(scores.values()) for scores in by_settings.values()]
    best = min(found, key=statistics.fmean)
    return Cell(statistics.fmean(best), statistics.stdev(best) if len(best) > 1 else None, len(best))


def _place(grouping: str) -> tuple[int, str]:
    return _ORDER.index(grouping) if grouping in _ORDER else len(_ORDER), grouping


def _terms(run: Run) -> dict[str, Any]:
    own = {"images": run.images_sha256, "metric": run.metric, "num_images": run.num_images}
    return {**own, "total_kimg": run.total_kimg, **run.scored}


def _require_same_terms(one: Run, other: Run) -> None:
    mine, theirs = _terms(one), _terms(other)
    for run, terms in ((one, mine), (other, theirs)):
        if terms["images"] is None:
            raise UserError(f"{run.folder} does not say of which images it is; leave it out, or finish it first")
    for name in sorted({*mine, *theirs}, key=[*mine, *theirs].index):
        if mine.get(name) != theirs.get(name):
            raise UserError(
                f"{other.folder} cannot be compared with {one.folder}: {name} is {theirs.get(name)} there and "
                f"{mine.get(name)} here; leave it out"
            )


def groupings_csv(groupings: Groupings) -> str:
    """One line for each grouping, one column for each C, at full precision; empty where nothing was trained."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["grouping", *groupings.clusters])
    for name, row in groupings.cells.items():
        writer.writerow([name, *(row[c].score if c in row else None for c in groupings.clusters)])
    return out.getvalue()


def groupings_markdown(groupings: Groupings) -> str:
    """The same as a Markdown table, with deviations, under a line that says what the cells are."""
    clusters = groupings.clusters
    lines = [groupings.title, "", "| | " + " | ".join(f"C = {c}" for c in clusters) + " |"]
    lines.append("|:---|" + "---:|" * len(clusters))
    for name, row in groupings.cells.items():
        lines.append(f"| {name} | " + " | ".join(_text(row, c) for c in clusters) + " |")
    return "\n".join(lines) + "\n"


def groupings_tables(groupings: Groupings) -> list[Table]:
    """The same for the terminal, in several tables where one would be too wide for 80 characters."""
    tables: list[Table] = []
    for clusters in _fitting(groupings):
        table = Table(title=None if tables else groupings.title, box=box.ASCII2, title_justify="left")
        table.add_column("", no_wrap=True)
        for c in clusters:
            table.add_column(f"C = {c}", justify="right", no_wrap=True)
        for name, row in groupings.cells.items():
            table.add_row(name, *(_text(row, c) for c in clusters))
        tables.append(table)
    return tables


def _fitting(groupings: Groupings) -> list[list[int]]:
    """The numbers of clusters in as few parts as fit the width of a terminal."""
    rows = groupings.cells
    names = max((len(name) for name in rows), default=0) + 4
    parts: list[list[int]] = []
    free = 0
    for c in groupings.clusters:
        width = max(len(f"C = {c}"), *(len(_text(row, c)) for row in rows.values())) + 3
        if width > free:
            parts.append([])
            free = _WIDTH - names
        parts[-1].append(c)
        free -= width
    return parts


def _text(row: Mapping[int, Cell], num_clusters: int) -> str:
    return str(row[num_clusters]) if num_clusters in row else ""
