"""Between the search and Tune's own searcher and scheduler: stored trials, duplicates, baselines, pruning."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from cedm_ray.config import Choice, Domain
from cedm_ray.stages.records import TrialRecord

Params = dict[str, Any]
MAX_REPEATS = 50


def tune_domain(domain: Domain) -> Any:
    """A domain of the search-space file as one of Tune's; both ends of a range are included."""
    if isinstance(domain, Choice):
        return tune.choice(list(domain.values))
    if domain.kind == "uniform":
        return tune.uniform(domain.low, domain.high)
    if domain.kind == "loguniform":
        return tune.loguniform(domain.low, domain.high)
    whole = tune.randint if domain.kind == "randint" else tune.lograndint
    return whole(int(domain.low), int(domain.high) + 1)


def log_spaced(low: int, stop: int, count: int) -> list[int]:
    """At most ``count`` integers in ``[low, stop)``, evenly spaced on a log scale, both ends among them."""
    points = np.geomspace(low, stop - 1, count) if count > 1 else [np.sqrt(low * (stop - 1))]
    return sorted({round(float(point)) for point in points})


def _name(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


class PruningOptunaSearch(OptunaSearch):
    """Tune's OptunaSearch that tells a stopped trial as pruned and counts its steps in kimg.

    Tune itself tells a trial that the scheduler stopped as complete with its early score, which makes a trial that
    was stopped at the first rung look as if that was all it could reach.
    """

    def __init__(self, *args: Any, total_kimg: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._total_kimg = total_kimg

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        super().on_trial_result(trial_id, {**result, "training_iteration": int(result["kimg"])})

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        whole = result is not None and result.get("kimg", 0) >= self._total_kimg
        super().on_trial_complete(trial_id, result if whole else None, error)

    def rename(self, old_id: str, new_id: str) -> None:
        """Let the proposal made under one trial id belong to another."""
        self._ot_trials[new_id] = self._ot_trials.pop(old_id)

    def enqueue(self, params: Params) -> None:
        """Propose these parameters next."""
        self._ot_study.enqueue_trial(params)

    def reseed(self, sampler: optuna.samplers.BaseSampler) -> None:
        """Take another sampler from now on."""
        self._ot_study.sampler = sampler


class GranularitySearcher(Searcher):
    """Proposes the baselines first, then numbers of clusters by Optuna, none of them twice.

    Args:
        space: Tune domains of the parameters, ``num_clusters`` among them.
        design: Parameters to try first.
        baselines: Parameters that run to the end and that Optuna does not hear of.
        known: Records of earlier trials of this search that are over.
        num_trials: Trials in all, the known ones included.
        total_kimg: Where a trial is complete.
        seed: Of the sampler.
        points: All values of ``num_clusters``, where that is the only parameter (None: others join in).
        grouping: What makes the clusters that are searched over.
    """

    def __init__(
        self,
        space: Mapping[str, Any],
        *,
        design: Sequence[Params],
        baselines: Sequence[Params],
        known: Iterable[TrialRecord],
        num_trials: int,
        total_kimg: int,
        seed: int,
        points: Sequence[int] | None,
        grouping: str = "temi",
    ) -> None:
        super().__init__(metric="score", mode="min")
        self._optuna = PruningOptunaSearch(
            OptunaSearch.convert_search_space(dict(space)), metric="score", mode="min", total_kimg=total_kimg
        )
        self._seed, self._num_trials, self._points, self._grouping = seed, num_trials, points, grouping
        self._baselines = list(baselines)
        self._proposed: dict[str, Params] = {}
        known = list(known)
        for record in known:
            self._add(record, total_kimg)
        done = {_name(self._searched(record.params)) for record in known}
        self._design = [params for params in design if _name(params) not in done]
        self._known = done

    @staticmethod
    def _searched(params: Mapping[str, Any]) -> Params:
        return {name: value for name, value in params.items() if name != "grouping"}

    def _add(self, record: TrialRecord, total_kimg: int) -> None:
        reached = [rung for rung in record.rungs if rung["kimg"] <= total_kimg]
        if not reached:
            return
        self._optuna.add_evaluated_point(
            self._searched(record.params),
            reached[-1]["score"],
            pruned=reached[-1]["kimg"] < total_kimg,
            intermediate_values=[rung["score"] for rung in reached],
        )

    def suggest(self, trial_id: str) -> Params | str | None:
        if self._baselines:
            baseline: Params = self._baselines.pop(0)
            return baseline
        if len(self._known) >= self._num_trials:
            return str(Searcher.FINISHED)
        params = self._new_params(trial_id)
        if params is None:
            return str(Searcher.FINISHED)
        self._known.add(_name(params))
        self._proposed[trial_id] = params
        return {"grouping": self._grouping, **params}

    def _new_params(self, trial_id: str) -> Params | None:
        """Parameters that were not proposed before: the design, then the sampler, then whatever C lies farthest off."""
        # The state of the sampler is a function of how many trials there were: a search that goes on after an
        # interruption proposes what it would have proposed without it.
        self._optuna.reseed(optuna.samplers.TPESampler(seed=self._seed + len(self._known), n_startup_trials=1))
        forced = self._design.pop(0) if self._design else None
        for repeat in range(MAX_REPEATS):
            if forced is None and repeat == MAX_REPEATS - 1:
                forced = self._farthest()
                if forced is None:
                    return None
            attempt = f"{trial_id}/{repeat}"
            if forced is not None:
                self._optuna.enqueue(forced)
                return dict(self._optuna.suggest(trial_id))
            params = dict(self._optuna.suggest(attempt))
            if _name(params) not in self._known:
                self._optuna.rename(attempt, trial_id)
                return params
            self._optuna.on_trial_complete(attempt, error=True)
        return None

    def _farthest(self) -> Params | None:
        """The untried number of clusters that lies farthest from the tried ones on a log scale."""
        if self._points is None:
            return None
        tried = np.log([json.loads(name)["num_clusters"] for name in self._known])
        left = [point for point in self._points if _name({"num_clusters": point}) not in self._known]
        return {"num_clusters": max(left, key=lambda c: np.abs(tried - np.log(c)).min())} if left else None

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if trial_id in self._proposed:
            self._optuna.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        if self._proposed.pop(trial_id, None) is not None:
            self._optuna.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' records are in the store, and a new searcher is told them."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see :meth:`save`."""


class RungScheduler(ASHAScheduler):
    """ASHA on kimg that knows the rungs of earlier trials and lets baselines run to the end.

    It judges the trials of one grouping, the one whose clusters are searched over.
    """

    def __init__(self, *, grace_kimg: int, total_kimg: int, reduction_factor: float, grouping: str = "temi") -> None:
        # max_t lies above the last report: the trial that reaches the end must not be cut off by its own report.
        super().__init__(
            time_attr="kimg",
            metric="score",
            mode="min",
            grace_period=grace_kimg,
            max_t=total_kimg + 1,
            reduction_factor=reduction_factor,
        )
        self._grouping = grouping

    def recall(self, records: Iterable[TrialRecord]) -> None:
        """Enter the rungs of trials that are over."""
        for record in records:
            for rung in record.rungs:
                self._brackets[0].on_result(SimpleNamespace(trial_id=record.key), rung["kimg"], -rung["score"])

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        if trial.config["grouping"] != self._grouping:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
        if trial.config["grouping"] == self._grouping:
            super().on_trial_complete(tune_controller, trial, result)
