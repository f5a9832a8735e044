"""What a search found: the plain view from which every figure is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cedm_ray.errors import UserError
from cedm_ray.report.bound_figure import Fidelity, FittedCurve
from cedm_ray.report.rows import Row, ScoreRow, TieSet
from cedm_ray.report.trial import Rung, Trial


@dataclass(frozen=True)
class Probe:
    """A clustering that was made for the sake of its r_C."""

    num_clusters: int
    ratio: float
    fidelity: Fidelity
    seed: int


@dataclass(frozen=True)
class Bound:
    """The search for C_max."""

    c_max: int
    interval: tuple[int, int] | None = None
    confidence: float | None = None
    probes: tuple[Probe, ...] = ()
    curve: FittedCurve | None = None


@dataclass(frozen=True)
class Final:
    """The best C at the full budget."""

    num_clusters: int
    kimg: float
    scores: tuple[ScoreRow, ...] = ()


@dataclass(frozen=True)
class Run:
    """One search, finished or not; what an earlier version did not write down is None or empty."""

    folder: Path
    """Where it lies now."""
    name: str
    grouping: str
    """What makes the clusters that C is searched over, or the given grouping."""
    metric: str
    """The score that decides."""
    num_images: int
    """Generated images behind each score of a trial."""
    total_kimg: int
    """Budget of a trial."""
    cutoff: float
    trials: tuple[Trial, ...]
    metrics: tuple[str, ...] = ()
    """All metrics, the deciding one first."""
    scored: dict[str, Any] = field(default_factory=dict)
    """What makes scores comparable: detector, weights, resize, dtype, dimensions, number of real images."""
    images_sha256: str | None = None
    """Digest of the real images."""
    recorded_folder: Path | None = None
    """Where it lay when it was written down."""
    upper_bound: Bound | None = None
    best: int | None = None
    """The visual groups, C_V; None while the search goes on."""
    final: Final | None = None
    tie_set: TieSet | None = None
    pareto: tuple[int, ...] | None = None
    """Numbers of clusters that no other one beats in all metrics."""
    mosaics: dict[int, Path] = field(default_factory=dict)
    """Pictures of clusterings by C."""
    confidence: Path | None = None
    """File of the samples with the highest and the lowest confidence."""

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], folder: Path) -> Run:
        """The view of a result.

        Args:
            tree: The result as plain values, as in ``result.json``.
            folder: Where the run lies.

        Raises:
            UserError: If a value is missing or of the wrong kind.
        """
        try:
            metrics = _metrics(tree)
            trials = [{**t, "rungs": [_rung(r, tree["metric"], metrics) for r in t["rungs"]]} for t in tree["trials"]]
            more = {"folder": folder, "recorded_folder": tree.get("folder"), "metrics": metrics, "trials": trials}
            found = _RUN.validate_python({**tree, **more})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise UserError(damaged(f"the result of {folder}", f"{place}: {first['msg'].lower()}")) from error
        except KeyError as error:
            raise UserError(damaged(f"the result of {folder}", f"{error.args[0]}: field required")) from error
        except (TypeError, AttributeError, ValueError) as error:
            raise UserError(damaged(f"the result of {folder}", "it holds no map of trials and their rungs")) from error
        return found

    def place(self, recorded: Path) -> Path:
        """Where a file lies that was written down with its path: a storage folder may have been moved or mounted."""
        if recorded.exists() or self.recorded_folder is None:
            return recorded
        old, new = self.recorded_folder.parent, self.folder.absolute().parent
        return new / recorded.relative_to(old) if recorded.is_relative_to(old) else recorded

    @property
    def c_max(self) -> int | None:
        return None if self.upper_bound is None else self.upper_bound.c_max

    @property
    def interval(self) -> tuple[int, int] | None:
        return None if self.upper_bound is None else self.upper_bound.interval

    @property
    def best_trial(self) -> Trial | None:
        """The first training of the best C, whose score stands beside the others'; None while the search goes on."""
        if self.best is None:
            return None
        return self.first_trial(self.grouping, self.best)

    @property
    def final_trial(self) -> Trial | None:
        """The training of the best C that was trained on to the full budget, which may repeat the first one.

        Where none was yet it is :attr:`best_trial`.
        """
        own = [trial for trial in self.trials if (trial.grouping, trial.num_clusters) == (self.grouping, self.best)]
        whole = [t for t in own if self.final is not None and t.rungs and t.rungs[-1].kimg == self.final.kimg]
        return min(whole, key=self._rank, default=self.best_trial)

    def first_trial(self, grouping: str, num_clusters: int) -> Trial | None:
        """Of the trials of a grouping and a C that repeat no other, the complete one with the lowest score."""
        found = [t for t in self.firsts() if (t.grouping, t.num_clusters) == (grouping, num_clusters)]
        return min(found, key=self._rank, default=None)

    def firsts(self) -> list[Trial]:
        """The trials that repeat no other one."""
        return [trial for trial in self.trials if trial.train_seed is None]

    def _rank(self, trial: Trial) -> tuple[bool, float, float]:
        rung = trial.rung_at(self.total_kimg)
        score = rung.score(self.metric) if rung else None
        return trial.state != "complete", math.inf if score is None else score, -len(trial.rungs)

    def rows(self, metric: str | None = None) -> list[Row]:
        """One row per trial, at the budget of the search, with the score of a metric (None: the deciding one)."""
        name = metric or self.metric
        return [self._row(trial, trial.rung_at(self.total_kimg), name) for trial in self.trials]

    def _row(self, trial: Trial, rung: Rung | None, metric: str) -> Row:
        return Row(
            trial.num_clusters,
            trial.utilization_ratio,
            rung.kimg if rung else 0,
            rung.score(metric) if rung else None,
            trial.state,
            trial.grouping,
            self.num_images,
            train_seed=trial.train_seed,
            sets=rung.score_sets if rung and metric == self.metric else (),
        )

    def probe_rows(self) -> list[Row]:
        """One row per probe of the search for C_max."""
        probes = self.upper_bound.probes if self.upper_bound else ()
        return [
            Row(p.num_clusters, p.ratio, 0, None, "probe", self.grouping, fidelity=p.fidelity, seed=p.seed)
            for p in probes
        ]

    def score_at_budget(self, trial: Trial, metric: str | None = None) -> float | None:
        """Score of a trial at the budget of the search, None where it has not come so far."""
        rung = trial.rung_at(self.total_kimg)
        return rung.score(metric or self.metric) if rung is not None and rung.kimg == self.total_kimg else None

    def baselines(self, metric: str | None = None) -> dict[str, float]:
        """Scores of the trainings of other groupings, at the budget of the search, by their labels."""
        scores = {t.label: self.score_at_budget(t, metric) for t in self.firsts() if t.grouping != self.grouping}
        return {label: score for label, score in scores.items() if score is not None}

    def compared(self) -> dict[str, float]:
        """The score of the best C, and after it those of the baselines, at the budget of the search."""
        best = self.best_trial
        if best is None:
            return {}
        score = self.score_at_budget(best)
        return {} if score is None else {best.label: score, **self.baselines()}


_RUN = TypeAdapter(Run)


def damaged(what: str, why: str) -> str:
    """The line for a user whose file is damaged."""
    return f"{what} is damaged ({why}); remove that file and run the same search again, which reads what is stored"


def _metrics(tree: Mapping[str, Any]) -> list[str]:
    """All metrics, the deciding one first; an earlier version named them in the rungs only."""
    if tree.get("metrics"):
        return list(tree["metrics"])
    names = {name for trial in tree["trials"] for rung in trial["rungs"] for name in rung}
    others = {name for name in names if name in ("fid", "fdd") or name.startswith("fd_")} - {tree["metric"]}
    return [tree["metric"], *sorted(others)]


def _rung(rung: Mapping[str, Any], metric: str, metrics: Sequence[str]) -> dict[str, Any]:
    """A report with the scores of all metrics in a map of their own."""
    scores = {metric: rung.get("score"), **{name: rung.get(name) for name in metrics if name in rung}}
    return {**rung, "values": {name: value for name, value in scores.items() if value is not None}}
