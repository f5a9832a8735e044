"""Who proposes the next number of clusters to train: Optuna's samplers, or the process over learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from cedm_ray.granularity.curve_model import CurveModel, Posterior
from cedm_ray.granularity.runs import Params, Run, Runs, mean_log_score

SamplerName = Literal["gp", "tpe", "random"]
MAX_REPEATS = 50
"""Proposals in a row that may be known already."""
MAX_DRAWS = 500
"""Of them by chance alone, in the end."""


class Sampler(Protocol):
    """Proposes parameters from what all runs have scored; the same runs give the same proposal."""

    def propose(self, runs: Runs, candidates: Sequence[int], weights: Sequence[float]) -> Params | None:
        """Parameters that no run has; None where there are none.

        Args:
            runs: All runs of the search.
            candidates: Numbers of clusters to choose from.
            weights: Of the objectives.
        """


def log_spaced(points: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the points, evenly spaced on a log scale, both ends among them."""
    wanted = np.linspace(math.log(points[0]), math.log(points[-1]), count) if count > 1 else [_middle(points)]
    return sorted({nearest(points, math.exp(u)) for u in wanted})


def _middle(points: Sequence[int]) -> float:
    return (math.log(points[0]) + math.log(points[-1])) / 2


def nearest(points: Sequence[int], num_clusters: float) -> int:
    """The point nearest to a number of clusters on a log scale."""
    return min(points, key=lambda point: abs(math.log(point / num_clusters)))


def farthest(runs: Runs, candidates: Sequence[int]) -> int | None:
    """The untried number of clusters that lies farthest from the tried ones on a log scale."""
    tried = {run.num_clusters for run in runs}
    left = [c for c in candidates if c not in tried]
    return max(left, key=lambda c: min((abs(math.log(c / t)) for t in tried), default=0.0)) if left else None


def observed(
    model: CurveModel, runs: Runs, candidates: Sequence[int], weights: Sequence[float], *, expected: bool = True
) -> Posterior | None:
    """The posterior after everything that was read; None before the first reading.

    Args:
        model: Over the candidates and the rungs of the search.
        runs: All runs.
        candidates: Numbers of clusters of the model.
        weights: Of the objectives.
        expected: Take what running trainings are expected to read at their targets as read (Ginsbourger's believer):
            two places are not given to the same question.
    """
    places = {c: i for i, c in enumerate(candidates)}
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
    if not ahead or not expected:
        return posterior
    read += [(candidate, rung, float(posterior.mean[rung, candidate])) for candidate, rung in ahead]
    return model.fit(*zip(*read, strict=True))


class GpSampler:
    """Draws one course of scores over C from the process and proposes where it is lowest (Thompson 1933).

    Args:
        model: Over the candidates and rungs of the search.
        seed: Of the draws.
    """

    def __init__(self, model: CurveModel, seed: int) -> None:
        self._model, self._seed = model, seed

    def propose(self, runs: Runs, candidates: Sequence[int], weights: Sequence[float]) -> Params | None:
        tried = {run.num_clusters for run in runs}
        if all(c in tried for c in candidates):
            return None
        posterior = observed(self._model, runs, candidates, weights)
        if posterior is None:
            fallback = farthest(runs, candidates)
            return None if fallback is None else {"num_clusters": fallback}
        drawn = posterior.draw(np.random.default_rng([self._seed, len(runs)]))
        untried = [i for i, c in enumerate(candidates) if c not in tried]
        return {"num_clusters": candidates[min(untried, key=lambda i: drawn[i])]}


class OptunaSampler:
    """Optuna's TPE or random sampler over the logarithm of C and any other parameters.

    Every proposal comes from a study that is built anew from the runs: those that were paused or stopped are pruned
    trials with their intermediate values, never finished ones with an early score.

    Args:
        kind: ``tpe`` or ``random``.
        seed: Of the sampler.
        space: Optuna distributions of parameters beside ``num_clusters``, by dotted path.
    """

    def __init__(self, kind: Literal["tpe", "random"], seed: int, space: Mapping[str, Any] | None = None) -> None:
        self._kind, self._seed, self._space = kind, seed, dict(space or {})

    def propose(self, runs: Runs, candidates: Sequence[int], weights: Sequence[float]) -> Params | None:
        if not self._space and all({"num_clusters": c} in runs for c in candidates):
            return None  # known without fifty proposals, each of which takes TPE milliseconds
        found = self._unknown(self.study(runs, candidates, weights), runs, candidates, MAX_REPEATS)
        if found is not None:
            return found
        if not self._space:
            untried = farthest(runs, candidates)
            return None if untried is None else {"num_clusters": untried}
        # TPE may hold on to one choice for ever; where chance finds nothing new either, all has been tried.
        return self._unknown(self._empty_study("random", len(runs)), runs, candidates, MAX_DRAWS)

    def _unknown(self, study: Any, runs: Runs, candidates: Sequence[int], repeats: int) -> Params | None:
        """The first proposal of a study that no run has."""
        space = self._distributions(candidates)
        for _ in range(repeats):
            trial = study.ask(space)
            params = {**trial.params, "num_clusters": nearest(candidates, trial.params["num_clusters"])}
            if params not in runs:
                return params
            # Known already: asked again, it costs nothing. Its values are in the study.
            study.tell(trial, state=_states().FAIL)
        return None

    def _distributions(self, candidates: Sequence[int]) -> dict[str, Any]:
        import optuna

        clusters = optuna.distributions.IntDistribution(candidates[0], max(candidates[-1], candidates[0] + 1), log=True)
        return {"num_clusters": clusters, **self._space}

    def study(self, runs: Runs, candidates: Sequence[int], weights: Sequence[float]) -> Any:
        """The runs as an Optuna study that minimises."""
        study = self._empty_study(self._kind, len(runs))
        space = self._distributions(candidates)
        trials = (_trial(run, runs.total_kimg, space, weights) for run in runs if run.readings)
        study.add_trials([trial for trial in trials if trial is not None])
        return study

    def _empty_study(self, kind: Literal["tpe", "random"], count: int) -> Any:
        """A study without trials, whose random numbers are those of the proposal after ``count`` runs."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = self._seed + count
        sampler = (
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=1)
            if kind == "tpe"
            else optuna.samplers.RandomSampler(seed=seed)
        )
        return optuna.create_study(sampler=sampler)


def _states() -> Any:
    import optuna

    return optuna.trial.TrialState


def _trial(run: Run, total_kimg: int, space: Mapping[str, Any], weights: Sequence[float]) -> Any:
    """A run as an Optuna trial: complete at the end of training, else pruned, its steps counted in kimg.

    None where it lies outside of the space, as a design of default values may.
    """
    import optuna

    if any(name not in run.params for name in space):
        return None
    values = {kimg: mean_log_score(scores, weights) for kimg, scores in run.readings.items()}
    complete = total_kimg in values
    try:
        return optuna.trial.create_trial(
            state=_states().COMPLETE if complete else _states().PRUNED,
            value=values[total_kimg] if complete else None,
            params={name: run.params[name] for name in space},
            distributions=dict(space),
            intermediate_values=values,
        )
    except ValueError:  # Optuna's word for a value that its distribution does not hold
        return None


def make_sampler(name: SamplerName, model: CurveModel, seed: int, space: Mapping[str, Any] | None = None) -> Sampler:
    """The sampler of that name.

    Raises:
        ValueError: If the process is asked to search over more than C.
    """
    if name != "gp":
        return OptunaSampler(name, seed, space)
    if space:
        raise ValueError(f"sampler gp searches over C alone, and the space holds {', '.join(space)}; take tpe")
    return GpSampler(model, seed)
