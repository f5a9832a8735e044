"""What the figures and tables are made from: one row per trial or probe."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

TrialState = Literal["complete", "stopped", "paused", "running", "failed"]
State = Literal[TrialState, "probe"]


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
    num_images: int | None = None
    """Generated images behind the score."""
    fidelity: str | None = None
    """How thorough the clustering of a probe is, for example "full" or "low"; None where there is one kind only."""
    seed: int | None = None
    """Seed of the clustering; None where it is not told apart."""
    train_seed: int | None = None
    """Seed of a training that repeats another one with the same C; None for the first one."""
    sets: tuple[float, ...] = ()
    """Scores of several sets of images of the same model, where there are several."""

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
    num_images: int | None = None
    """Generated images behind each score."""


@dataclass(frozen=True)
class TieSet:
    """Numbers of clusters whose scores cannot be told from the best one's."""

    clusters: tuple[int, ...]
    smallest: int
    best: int
    margin: float
    """How far above the best score the band ends, as a share of it."""
    low: float | None
    """Scores from here to ``high`` are the band; None where several scores were minimised together."""
    high: float | None


@dataclass(frozen=True)
class ScoreRow:
    """One score of the final model; ``std`` is None where the metric has none."""

    metric: str
    value: float
    std: float | None
    detector: str
    num_images: int
    num_reference: int
    num_sets: int


def one_count(items: Sequence[Row] | Sequence[Curve]) -> int | None:
    """Generated images behind the scores that are to be shown side by side, None where it is not known.

    Raises:
        ValueError: If there are different numbers, whose scores cannot be compared.
    """
    counts = sorted({item.num_images for item in items if item.num_images is not None})
    if len(counts) > 1:
        raise ValueError(f"scores of {' and '.join(f'{n:,}' for n in counts)} images cannot be shown side by side")
    return counts[0] if counts else None


def best_row(rows: Sequence[Row], best: int | None = None) -> Row | None:
    """The complete row with the lowest score (the smaller C where two are equal), or None where none is complete.

    Repeats do not compete: whoever is trained more often would win more often.

    Args:
        rows: Trials and probes.
        best: The C that was decided for, whose rows alone count: retrainings, or several scores together, may decide
            for another one than the lowest score. None while nothing is decided.
    """
    firsts = (row for row in rows if row.state == "complete" and row.train_seed is None)
    firsts = (row for row in firsts if best is None or row.num_clusters == best)
    scored = [(row.score, row.num_clusters, row) for row in firsts if row.score is not None]
    return min(scored, key=lambda entry: entry[:2])[2] if scored else None


def metric_title(metric: str, num_images: int | None = None) -> str:
    """A metric's name for people: ``fid`` is "FID", ``fd_lenet`` is "FD (lenet)", with the count where it is known."""
    title = f"FD ({metric[3:]})" if metric.startswith("fd_") else metric.upper()
    return title if num_images is None else f"{title} of {num_images:,} images"
