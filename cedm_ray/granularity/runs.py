"""Trainings as a search sees them: how far each has come, what it scored there, and what it may still cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Params = Mapping[str, Any]
"""``num_clusters`` and the dotted paths of other settings that are searched over."""
RunState = Literal["running", "paused", "stopped", "complete", "failed"]
LEAST_SCORE = 1e-12


def name_of(params: Params) -> str:
    """What tells one training from another: its parameters in a fixed order."""
    return json.dumps(params, sort_keys=True)


@dataclass(frozen=True)
class Leg:
    """A stretch of one run (one training), from one rung to a later one."""

    key: str
    """Of the run; the same for all its legs."""
    params: Params
    start_kimg: int
    """0 for a new run; rungs up to here have been heard of."""
    stop_kimg: int


@dataclass
class Run:
    """One training."""

    params: Params
    state: RunState
    target_kimg: int
    """How far it trains at present, or has trained."""
    readings: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """Scores by kimg, ascending; one for each objective, lower is better."""

    @property
    def num_clusters(self) -> int:
        return int(self.params["num_clusters"])

    @property
    def reached_kimg(self) -> int:
        return max(self.readings, default=0)

    @property
    def charged_kimg(self) -> int:
        """What it has used of the budget; a run that trains is charged up to its target."""
        return self.target_kimg if self.state == "running" else self.reached_kimg


class Runs:
    """All trainings of one search.

    Args:
        rungs_kimg: Where trainings are scored, ascending, in thousands of images; the last one ends a training.

    Raises:
        ValueError: If the rungs do not ascend from above 0.
    """

    def __init__(self, rungs_kimg: Sequence[int]) -> None:
        if not rungs_kimg or any(a >= b for a, b in zip([0, *rungs_kimg], rungs_kimg, strict=False)):
            raise ValueError(f"rungs_kimg are {tuple(rungs_kimg)}; they must ascend from above 0")
        self.rungs_kimg = tuple(rungs_kimg)
        self._runs: dict[str, Run] = {}

    @property
    def total_kimg(self) -> int:
        return self.rungs_kimg[-1]

    @property
    def spent_kimg(self) -> int:
        """Images that all runs have seen, and those that running ones are still to see, in thousands."""
        return sum(run.charged_kimg for run in self)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs.values())

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, key: str) -> Run:
        return self._runs[key]

    def holds(self, params: Params) -> bool:
        """Whether one of the trainings has these parameters."""
        return name_of(params) in self._runs

    def add(self, run: Run) -> str:
        """Take a run in; returns its key."""
        key = name_of(run.params)
        self._runs[key] = run
        return key

    def in_state(self, *states: RunState) -> list[Run]:
        """Runs in one of these states, in the order in which they started."""
        return [run for run in self if run.state in states]

    def next_rung(self, run: Run | None) -> int:
        """The rung after the last one that a run has reached (None: a new run)."""
        reached = 0 if run is None else run.reached_kimg
        return next(rung for rung in self.rungs_kimg if rung > reached)


def mean_log_score(scores: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Several scores as one number: the logarithm of their weighted geometric mean.

    Args:
        scores: One for each objective; what is below 1e-12 counts as 1e-12, since rounding may leave a distance at or
            below 0.
        weights: Of the objectives, not all 0; None for equal ones.

    Raises:
        ValueError: If there are not as many weights as scores.
    """
    logs = [math.log(max(score, LEAST_SCORE)) for score in scores]
    if weights is None:
        return sum(logs) / len(logs)
    return sum(w * x for w, x in zip(weights, logs, strict=True)) / sum(weights)
