"""Who goes on from a rung: nobody is stopped, the two variants of ASHA, or what the fitted learning curves say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from cedm_ray.granularity.curve_model import CurveModel
from cedm_ray.granularity.runs import Run, Runs, scalar
from cedm_ray.granularity.samplers import observed

RuleName = Literal["fitted", "promotion", "asha", "none"]
Proposal = tuple[int | Run, int]
"""A new number of clusters or a run to go on with, and the kimg to train it to."""


def stopping_rung_passed(scores: Sequence[float], own: float, eta: float) -> bool:
    """ASHA's stopping variant: whether a run goes on from a rung, which the first one there always does.

    Args:
        scores: Scores at that rung of the runs that came before, lower is better.
        own: The run's own score.
        eta: One in this many goes on.

    Source: arXiv 1810.05934, as in Ray Tune: not worse than the best 1/eta quantile of those before.
    """
    return not scores or own <= float(np.percentile(np.asarray(scores, dtype=np.float64), 100 / eta))


def promotable(runs: Runs, eta: float) -> Run | None:
    """ASHA's promotion variant: the best paused run among the best 1/eta of a rung, the highest rung first.

    Source: arXiv 1810.05934, Algorithm 2.
    """
    for rung in reversed(runs.rungs_kimg[:-1]):
        there = sorted((run for run in runs if rung in run.readings), key=lambda run: scalar(run.readings[rung]))
        for run in there[: int(len(there) / eta)]:
            if run.state == "paused" and run.reached_kimg == rung:
                return run
    return None


def favourite(among: Sequence[Run]) -> Run | None:
    """The run that looks best at the highest rung that any of them has reached."""
    if not any(run.readings for run in among):
        return None
    high = max(run.reached_kimg for run in among)
    return min((run for run in among if run.reached_kimg == high), key=lambda run: scalar(run.readings[high]))


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
        candidates: Sequence[int],
        weights: Sequence[float],
        left_kimg: float,
        *,
        may_start: bool = True,
    ) -> Proposal | None:
        """The next leg that is worth its images, or None.

        Args:
            runs: All runs of the search.
            candidates: Numbers of clusters of the model.
            weights: Of the objectives.
            left_kimg: What of the budget is neither spent nor promised, in thousands of images.
            may_start: Whether a new number of clusters may be started.
        """
        posterior = observed(self._model, runs, candidates, weights)
        if posterior is None:
            return None
        by_clusters = {run.num_clusters: run for run in runs}
        final = posterior.final
        alive = {run.num_clusters for run in runs.in_state("running", "paused", "complete")}
        tried = [i for i, c in enumerate(candidates) if c in alive]
        top = min(tried, key=lambda i: final[i], default=None)
        if top is None:
            return None
        top_run = by_clusters[candidates[top]]
        finish = runs.total_kimg - top_run.charged_kimg
        best: tuple[float, Proposal] | None = None
        largest = 0.0
        for i, c in enumerate(candidates):
            run = by_clusters.get(c)
            if (run is None and not may_start) or (run is not None and run.state != "paused"):
                continue
            reached = 0 if run is None else run.reached_kimg
            for rung, kimg in enumerate(runs.rungs_kimg):
                if kimg <= reached:
                    continue
                cost = kimg - reached
                keep = finish - (cost if i == top else 0)
                if cost + max(keep, 0) > left_kimg:
                    break
                gain = posterior.gain(i, rung)
                largest = max(largest, gain)
                value = gain / cost**0.5
                if best is None or value > best[0]:
                    best = value, (c if run is None else run, kimg)
        if best is not None and largest > self._tolerance:
            return best[1]
        # What looks best may look so for its early scores alone: it is trained on from rung to rung, to its end.
        if finish and top_run.state == "paused" and finish <= left_kimg:
            return top_run, runs.next_rung(top_run)
        return None
