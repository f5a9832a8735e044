"""What a search found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from cedm_ray.granularity.decision import TieSet
from cedm_ray.metrics.scores import Score
from cedm_ray.report.figures import figures
from cedm_ray.report.run import Run
from cedm_ray.stages.budget.spending import mimg
from cedm_ray.stages.results.bounds import LowerBound, UpperBound
from cedm_ray.stages.training.records import FinalScore, TrialRecord

COMPARABLE = ("fid", "fdd")
NOT_COMPARABLE = "; not comparable with FID or FDD"


@dataclass(frozen=True)
class SearchResult:
    """Everything that a finished search says."""

    name: str
    folder: str
    grouping: str
    """What makes the clusters: temi, kmeans, or a grouping whose C is given."""
    metric: str
    """Name of the score that decides, lower is better."""
    metrics: tuple[str, ...]
    """Names of all scores, the deciding one first."""
    scored: Mapping[str, Any]
    """What makes the score comparable: detector, weights, resize, dtype, dimensions, number of real images."""
    images_sha256: str
    """Digest of the real images."""
    num_images: int
    """Generated images behind each score of the search."""
    total_kimg: int
    cutoff: float
    upper_bound: UpperBound | None
    """C_max; None where C was not searched over."""
    lower_bound: LowerBound | None
    searched: tuple[int, int] | None
    """C was searched over from the first of these to below the second."""
    trials: tuple[TrialRecord, ...]
    best: int
    """The number of clusters with the lowest score: the visual groups, C_V."""
    tie_set: TieSet
    """The numbers of clusters that noise cannot tell from it."""
    pareto: tuple[int, ...] | None
    """Numbers of clusters that no other one beats in all scores, where several are minimised."""
    final: FinalScore
    mosaics: Mapping[int, str]
    """Pictures of the clusterings, by C."""
    confidence: str | None
    """File of the samples that the clustering is most and least sure of."""
    costs: Mapping[str, float | None]
    """Images seen, device-hours and energy, and what the full grid would have seen."""
    tracking_uri: str
    ui_command: str
    run_id: str
    page: str | None = None
    """Address of the search's page in MLflow, once what :attr:`ui_command` says is done."""

    @cached_property
    def view(self) -> Run:
        """The same as the report reads it, from which tables and figures are made."""
        return Run.from_tree(asdict(self), Path(self.folder))

    @property
    def c_max(self) -> int | None:
        return None if self.upper_bound is None else self.upper_bound.c_max

    def to_pandas(self) -> pd.DataFrame:
        """The trials as a data frame, one row each, with their scores at the budget of the search."""
        return pd.DataFrame([asdict(row) for row in self.view.rows()])

    def figures(self) -> dict[str, Figure]:
        """The figures of the search as matplotlib objects, by name: ``score_by_clusters``, ``upper_bound``, ..."""
        return figures(self.view)

    def facts(self) -> list[tuple[str, str]]:
        """What else is to be said of the result, by name."""
        ties, scored = self.tie_set, self.scored
        tied = f"C = {', '.join(map(str, ties.clusters))} within the noise of {ties.margin:.1%}"
        found = [("tie set", f"{tied}; the smallest is {ties.smallest}")]
        if self.pareto:
            found.append(("Pareto front", f"C = {', '.join(map(str, self.pareto))}"))
        found.append(("cost", _cost(self.costs)))
        if self.lower_bound:
            found.append(("lower bound", self.lower_bound.sentence()))
        score = f"Fréchet distance on {scored['dim']} features of {scored['detector']}, {self.num_images:,} generated "
        score += f"against {scored['count']:,} real images{'' if self.metric in COMPARABLE else NOT_COMPARABLE}"
        return [*found, ("final", self.sentence()), ("score", score)]

    def scores(self) -> list[Score]:
        """All scores of the final model, the search's own first."""
        return [Score(**score) for score in self.final.scores]

    def sentence(self) -> str:
        """The result in words."""
        what = (
            f"Trained on {self.grouping} ({self.best} groups)"
            if self.searched is None
            else f"The best of the tried numbers of clusters in [{self.searched[0]}, {self.searched[1]}) is {self.best}"
        )
        return (
            f"{what}: {self.metric} {self.final.mean:.4g} +- {self.final.std:.2g} at {self.final.kimg:,} kimg "
            f"({self.final.num_sets} x {self.final.num_images:,} images)."
        )


def _cost(costs: Mapping[str, float | None]) -> str:
    """What the search has cost, in words."""
    spent, grid = costs["spent_mimg"] or 0.0, costs["grid_mimg"] or 0.0
    said = mimg(spent * 1000)
    if grid > spent:
        said += f" (a full grid: {mimg(grid * 1000)})"
    hours, energy = costs["device_hours"], costs["energy_kwh"]
    said += f", {hours:,.3g} device-hours" if hours else ""
    return said + (f", {energy:,.3g} kWh" if energy else "")
