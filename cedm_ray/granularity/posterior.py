"""What the trainings of a search have told about every number of clusters."""

from __future__ import annotations

from collections.abc import Sequence

from cedm_ray.granularity.curve_model import CurveModel, Posterior
from cedm_ray.granularity.runs import Runs, mean_log_score


def posterior_of(model: CurveModel, runs: Runs, weights: Sequence[float]) -> Posterior | None:
    """The posterior after everything that was read; None before the first reading.

    What running trainings are expected to read at their targets counts as read (Ginsbourger's believer), so that two
    places are not given to the same question.

    Args:
        model: Over the rungs of the search; runs of numbers of clusters that it does not know are left out.
        runs: All runs.
        weights: Of the objectives.
    """
    places = {c: i for i, c in enumerate(model.num_clusters)}
    read = [
        (places[run.num_clusters], runs.rungs_kimg.index(kimg), mean_log_score(scores, weights))
        for run in runs
        if run.num_clusters in places
        for kimg, scores in run.readings.items()
        if kimg in runs.rungs_kimg
    ]
    if not read:
        return None
    posterior = model.fit(*zip(*read, strict=True))
    ahead = [
        (places[run.num_clusters], runs.rungs_kimg.index(run.target_kimg))
        for run in runs.in_state("running")
        if run.num_clusters in places and run.target_kimg > run.reached_kimg
    ]
    if not ahead:
        return posterior
    read += [(candidate, rung, float(posterior.mean[rung, candidate])) for candidate, rung in ahead]
    return model.fit(*zip(*read, strict=True))
