"""Who goes on from a rung: nobody is stopped, the two variants of ASHA, or what the fitted learning curves say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cedm_ray.granularity.curve_model import CurveModel
from cedm_ray.granularity.posterior import posterior_of
from cedm_ray.granularity.runs import Run, Runs, mean_log_score

RuleName = Literal["fitted", "promotion", "asha", "none"]
Proposal = tuple[int | Run, int]
"""A new number of clusters or a run to go on with, and the kimg to train it to."""


def stopping_rung_passed(scores: Sequence[float], own: float, eta: float) -> bool:
    """ASHA's stopping variant: whether a run goes on from a rung, which the first one there always does.

    Args:
        scores: Scores at that rung of the runs that came before, lower is better.
        own: The run's own score.
        eta: One in this many goes on.

    Source: arXiv 1810.05934, as in Ray Tune: not worse than the best 1/eta quantile of those before. The quantile is
    interpolated between two scores: where they are given as logarithms, as the search does, by a geometric mean
    where Ray Tune takes an arithmetic one.
    """
    return not scores or own <= float(np.percentile(np.asarray(scores, dtype=np.float64), 100 / eta))


def promotable(runs: Runs, eta: float) -> Run | None:
    """ASHA's promotion variant: the best paused run among the best 1/eta of a rung, the highest rung first.

    Source: arXiv 1810.05934, Algorithm 2.
    """
    for rung in reversed(runs.rungs_kimg[:-1]):
        there = [run for run in runs if rung in run.readings]
        there.sort(key=lambda run: mean_log_score(run.readings[rung]))
        for run in there[: int(len(there) / eta)]:
            if run.state == "paused" and run.reached_kimg == rung:
                return run
    return None


def favourite(among: Sequence[Run]) -> Run | None:
    """The run that looks best at the highest rung that any of them has reached."""
    if not any(run.readings for run in among):
        return None
    high = max(run.reached_kimg for run in among)
    return min((run for run in among if run.reached_kimg == high), key=lambda run: mean_log_score(run.readings[high]))


class FittedChooser:
    """Weighs every leg by what it is expected to tell about the lowest final score, for its images.

    The value of a leg is its knowledge gradient over the square root of its images: over the images themselves it
    would spend everything on short legs, whose scores say least. What it takes to finish the training that looks best
    is kept back.

    Args:
        model: Over the candidates and rungs of the search.
        tolerance: When no leg is expected to lower ln(score) by more than this, only the training that looks best goes
            on, and the search ends with it.
    """

    def __init__(self, model: CurveModel, tolerance: float) -> None:
        self._model, self._tolerance = model, tolerance

    def choose(
        self,
        runs: Runs,
        weights: Sequence[float],
        left_kimg: float,
        *,
        may_start: bool = True,
    ) -> Proposal | None:
        """The next leg that is worth its images, or None.

        Args:
            runs: All runs of the search.
            weights: Of the objectives.
            left_kimg: What of the budget is neither spent nor promised, in thousands of images.
            may_start: Whether a new number of clusters may be started.
        """
        candidates = self._model.num_clusters
        posterior = posterior_of(self._model, runs, weights)
        places = {c: i for i, c in enumerate(candidates)}
        alive = [run for run in runs.in_state("running", "paused", "complete") if run.num_clusters in places]
        if posterior is None or not alive:
            return None
        top = min(alive, key=lambda run: (posterior.final[places[run.num_clusters]], places[run.num_clusters]))
        finish = runs.total_kimg - top.charged_kimg
        affordable = [
            leg
            for leg in _possible_legs(runs, candidates, may_start=may_start)
            if leg.kimg + max(finish - (leg.kimg if leg.what is top else 0), 0) <= left_kimg
        ]
        gains = [posterior.gain(leg.candidate, leg.rung) for leg in affordable]
        if gains and max(gains) > self._tolerance:
            values = [gain / leg.kimg**0.5 for gain, leg in zip(gains, affordable, strict=True)]
            best = affordable[values.index(max(values))]
            return best.what, runs.rungs_kimg[best.rung]
        # What looks best may look so for its early scores alone: it is trained on from rung to rung, to its end.
        if finish and top.state == "paused" and finish <= left_kimg:
            return top, runs.next_rung(top)
        return None


@dataclass(frozen=True)
class _PossibleLeg:
    candidate: int
    """Index of the number of clusters."""
    rung: int
    """Index of the rung at which it ends."""
    kimg: int
    """What it costs."""
    what: int | Run
    """The number of clusters to start, or the run to go on with."""


def _possible_legs(runs: Runs, candidates: Sequence[int], *, may_start: bool) -> Iterator[_PossibleLeg]:
    """To every later rung, of each run that is paused and of each number of clusters that has no run."""
    by_clusters = {run.num_clusters: run for run in runs}
    for candidate, num_clusters in enumerate(candidates):
        run = by_clusters.get(num_clusters)
        if (run is None and not may_start) or (run is not None and run.state != "paused"):
            continue
        reached = 0 if run is None else run.reached_kimg
        for rung, kimg in enumerate(runs.rungs_kimg):
            if kimg > reached:
                yield _PossibleLeg(candidate, rung, kimg - reached, num_clusters if run is None else run)
