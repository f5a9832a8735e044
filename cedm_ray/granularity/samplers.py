"""Who proposes the next number of clusters to train: Optuna's samplers, or the process over learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from cedm_ray.granularity.curve_model import CurveModel
from cedm_ray.granularity.posterior import posterior_of
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


class GpSampler:
    """Draws one course of scores over C from the process and proposes where it is lowest (Thompson 1933).

    Args:
        model: Over the rungs of the search; knows every number of clusters that there is to choose from.
        seed: Of the draws.
    """

    def __init__(self, model: CurveModel, seed: int) -> None:
        self._model, self._seed = model, seed

    def propose(self, runs: Runs, candidates: Sequence[int], weights: Sequence[float]) -> Params | None:
        tried = {run.num_clusters for run in runs}
        untried = [c for c in candidates if c not in tried]
        if not untried:
            return None
        posterior = posterior_of(self._model, runs, weights)
        if posterior is None:
            return {"num_clusters": farthest(runs, candidates)}
        drawn = posterior.draw(np.random.default_rng([self._seed, len(runs)]))
        score = dict(zip(self._model.num_clusters, drawn.tolist(), strict=True))
        return {"num_clusters": min(untried, key=lambda c: score[c])}


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
        if not self._space and all(runs.holds({"num_clusters": c}) for c in candidates):
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
            if not runs.holds(params):
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
