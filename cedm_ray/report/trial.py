"""One training of a search, as it was written down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cedm_ray.report.rows import Curve, TrialState


@dataclass(frozen=True)
class Rung:
    """One report of a trial."""

    kimg: float
    values: dict[str, float]
    """Score of each metric, lower is better."""
    num_images: int | None = None
    """Generated images behind each score."""
    score_sets: tuple[float, ...] = ()
    """Scores of several sets of images, where several were made."""
    checkpoint_path: Path | None = None
    """Folder with the samples of this report; a newer one may have replaced it."""

    def score(self, metric: str) -> float | None:
        """Score of a metric, None where there is none or where training diverged."""
        value = self.values.get(metric)
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Trial:
    """One training."""

    key: str
    """Stands for everything that decides the training: equal keys, the same training."""
    label: str
    grouping: str
    num_clusters: int
    params: dict[str, Any]
    state: TrialState
    utilization_ratio: float | None = None
    rungs: tuple[Rung, ...] = ()
    """Ascending in kimg."""
    reason: str | None = None
    """Why it failed."""

    @property
    def train_seed(self) -> int | None:
        """Seed of a training that repeats another one with the same C; None for the first one."""
        seed = self.params.get("train_seed")
        return None if seed is None else int(seed)

    def rung_at(self, kimg: float) -> Rung | None:
        """The report at so many kimg, or the last one before."""
        reached = [rung for rung in self.rungs if rung.kimg <= kimg]
        return reached[-1] if reached else None

    def curve(self, metric: str, num_clusters: int | None, num_images: int) -> Curve:
        """All its scores."""
        scores = ((rung.kimg, rung.score(metric)) for rung in self.rungs)
        points = tuple((kimg, score) for kimg, score in scores if score is not None)
        return Curve(self.label, num_clusters, points, num_images)
