"""What the figures and tables are made from: one row per trial or probe."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

State = Literal["complete", "stopped", "running", "failed", "probe"]


@dataclass(frozen=True)
class Row:
    """One number of clusters that was trained on (a trial) or only clustered with (a probe).

    ``score`` is the last one measured, None where none is; ``utilization_ratio`` is r_C, None where it is unknown.
    """

    num_clusters: int
    utilization_ratio: float | None
    kimg: float
    score: float | None
    state: State
    grouping: str = "temi"

    def __post_init__(self) -> None:
        if self.num_clusters < 1:
            raise ValueError(f"num_clusters is {self.num_clusters}; it must be at least 1")
        if self.state not in get_args(State):
            raise ValueError(f"state is {self.state!r}; it must be one of {', '.join(get_args(State))}")
        for name in ("utilization_ratio", "score"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; it must be finite, or None where it is unknown")


@dataclass(frozen=True)
class Curve:
    """Scores of one training run, ``points`` being (kimg, score); ``num_clusters`` is None for a baseline."""

    label: str
    num_clusters: int | None
    points: tuple[tuple[float, float], ...]


def best_row(rows: Sequence[Row]) -> Row | None:
    """The complete row with the lowest score (the smaller C where two are equal), or None where none is complete."""
    scored = [(row.score, row.num_clusters, row) for row in rows if row.state == "complete" and row.score is not None]
    return min(scored, key=lambda entry: entry[:2])[2] if scored else None


def metric_title(metric: str) -> str:
    """A metric's name for people: ``fid`` is "FID", ``fd_lenet`` is "FD (lenet)"."""
    if metric.startswith("fd_"):
        return f"FD ({metric[3:]})"
    return metric.upper()
