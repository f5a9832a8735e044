"""What a search found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from cedm_ray.granularity.decision import TieSet
from cedm_ray.metrics.scores import Score
from cedm_ray.report.figures import figures
from cedm_ray.report.read_run import read_run
from cedm_ray.report.rows import Row
from cedm_ray.stages.budget import mimg
from cedm_ray.stages.lower_bound import LowerBound
from cedm_ray.stages.records import FinalScore, TrialRecord
from cedm_ray.stages.upper_bound import UpperBound

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

    def rows(self) -> list[Row]:
        """One row per trial, at the budget of the search."""
        found = []
        for trial in self.trials:
            rung = trial.rung_at(self.total_kimg) or {"kimg": 0, "score": None}
            scored = rung["kimg"], rung["score"], trial.state, trial.grouping, self.num_images
            found.append(Row(trial.num_clusters, trial.utilization_ratio, *scored))
        return found

    def probe_rows(self) -> list[Row]:
        """One row per probe of the search for C_max."""
        probes = self.upper_bound.probes if self.upper_bound else ()
        return [
            Row(p.num_clusters, p.ratio, 0, None, "probe", self.grouping, fidelity=p.fidelity, seed=p.seed)
            for p in probes
        ]

    @property
    def c_max(self) -> int | None:
        return None if self.upper_bound is None else self.upper_bound.c_max

    def baselines(self) -> dict[str, float]:
        """Scores of the trainings without clusters, at the budget of the search."""
        scores = {t.label: t.rung_at(self.total_kimg) for t in self.trials if t.grouping != self.grouping}
        return {label: float(rung["score"]) for label, rung in scores.items() if rung is not None}

    def to_pandas(self) -> pd.DataFrame:
        """The trials as a data frame, one row each."""
        return pd.DataFrame([asdict(row) for row in self.rows()])

    def figures(self) -> dict[str, Figure]:
        """The figures of the search as matplotlib objects, by name: ``score_by_clusters``, ``upper_bound``, ..."""
        return figures(read_run(Path(self.folder)))

    def best_score(self) -> tuple[str, float]:
        """Label and score of the best C's training at the end of the search; of several the one with the lowest."""
        own = [t for t in self.trials if t.grouping == self.grouping and t.num_clusters == self.best]
        rungs = [(t.label, rung) for t in own for rung in t.rungs if rung["kimg"] == self.total_kimg]
        label, rung = min(rungs, key=lambda each: float(each[1]["score"]))
        return label, float(rung["score"])

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
