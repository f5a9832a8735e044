"""The search over C below C_max: what to train next is asked of the search, and the baselines run beside it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import numpy as np

from cedm_ray.config import SearchConfig
from cedm_ray.domains import Choice, Domain
from cedm_ray.granularity.rank_agreement import disagreement, rank_agreement
from cedm_ray.granularity.search import GranularitySearch, SearchPlan
from cedm_ray.stages.budget.account import Account
from cedm_ray.stages.budget.spending import mimg
from cedm_ray.stages.cluster.waiting import Places
from cedm_ray.stages.context import Context
from cedm_ray.stages.inputs.embed import Embeddings
from cedm_ray.stages.show.progress import duration
from cedm_ray.stages.training.ledger import Ledger
from cedm_ray.stages.training.trials import TrialSource, tune_trials


def grid(points: range, count: int) -> tuple[int, ...]:
    """At most ``count`` of the numbers of clusters, log-spaced, both ends among them."""
    if len(points) <= count:
        return tuple(points)
    spaced = np.geomspace(points.start, points.stop - 1, count) if count > 1 else [points.stop - 1]
    return tuple(sorted({round(float(point)) for point in spaced}))


def search_granularity(ctx: Context, ledger: Ledger, points: range, embeddings: Embeddings, account: Account) -> None:
    """Train C-EDM for numbers of clusters and for the baselines; what is done already is not repeated.

    Args:
        ctx: The search.
        ledger: Where trials are written down.
        points: Numbers of clusters to search over; empty where the grouping has no C to search over.
        embeddings: The embeddings and their neighbours.
        account: What may be trained.
    """
    config = ctx.config
    complete = [record.params for record in ledger.records if record.state == "complete"]
    given = [params for params in ledger.planner.fixed() if params not in complete]
    search = make_search(config, grid(points, config.granularity.grid_points), account) if points else None
    if search is not None:
        _recall(search, ledger)
    watch = Watch(ctx, ledger, search, account)
    source = TrialSource(
        ledger,
        given,
        search,
        grouping=config.grouping,
        metrics=_objectives(ledger),
        allowed_kimg=account.allowed_kimg,
        on_score=watch.scored,
    )
    title = f"searching over C in [{points.start}, {points.stop})" if points else "training on the given groups"
    account.measure(ledger.records)
    places = Places(ctx.shares, config.granularity.max_concurrent)
    with ctx.terminal.stage(title, ctx.board, watch.outlook):
        tune_trials(ctx, ledger, "granularity", embeddings, source, at_once=places)
    if points:
        ledger.close_left(config.grouping)


def trials_at_once(ctx: Context) -> int:
    """Trainings side by side by which a search is planned: what the cluster holds, or what the settings allow."""
    return min(ctx.shares.max_trials, ctx.config.granularity.max_concurrent or ctx.shares.max_trials)


def make_search(config: SearchConfig, candidates: tuple[int, ...], account: Account) -> GranularitySearch:
    """The search over these numbers of clusters, before it knows of any training."""
    settings, space = config.granularity, bool(config.space)
    plan = SearchPlan(
        candidates=candidates,
        rungs_kimg=settings.rungs_kimg(),
        rule=settings.rule_name(space=space),
        sampler=settings.sampler_name(space=space),
        startup=settings.startup_trials,
        num_trials=settings.num_trials,
        eta=settings.reduction_factor,
        tolerance=settings.tolerance,
        retrain_spread=settings.retrain_spread,
        objectives=len(config.score.detectors) if settings.multi_objective else 1,
        seed=config.seed,
    )
    others = {path: (optuna_distribution(domain), _start(config, path)) for path, domain in config.space.items()}
    return GranularitySearch(plan, account.allowed_kimg(), others)


def optuna_distribution(domain: Domain) -> Any:
    """A domain of the search-space file as one of Optuna's; both ends of a range are included."""
    from optuna import distributions

    if isinstance(domain, Choice):
        return distributions.CategoricalDistribution(list(domain.values))
    low, high = domain.ends()
    if domain.kind.endswith("randint"):
        return distributions.IntDistribution(int(low), int(high), log=domain.kind == "lograndint")
    return distributions.FloatDistribution(low, high, log=domain.kind == "loguniform")


def _start(config: SearchConfig, path: str) -> Any:
    """The value of the first trainings: that of the settings, or what of the domain lies nearest to it."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    domain = config.space[path]
    if isinstance(domain, Choice):
        return value if value in domain.values else domain.values[0]
    low, high = domain.ends()
    return low if value is None else min(max(value, low), high)


def _objectives(ledger: Ledger) -> tuple[str, ...]:
    """Names of the scores that are minimised, as reports have them."""
    planner = ledger.planner
    return planner.scoring.metrics if planner.config.granularity.multi_objective else ("score",)


def _recall(search: GranularitySearch, ledger: Ledger) -> None:
    """Tell a search what earlier processes have trained for it.

    What other searches have trained beyond the last leg that this one asked for is left out: it is not paid for yet. A
    training that diverged stays stopped. Of one that was cut off under ASHA's stopping variant the last rung is left
    out: whether it goes on from there may not have been decided, and it reports that rung again.
    """
    config = ledger.planner.config
    metrics = _objectives(ledger)
    for record in ledger.records:
        if record.grouping != config.grouping or "train_seed" in record.params:
            continue
        params = {name: value for name, value in record.params.items() if name != "grouping"}
        readings = {int(rung["kimg"]): [float(rung[name]) for name in metrics] for rung in record.rungs}
        finite = {kimg: scores for kimg, scores in readings.items() if all(map(math.isfinite, scores))}
        asha, diverged = search.plan.rule == "asha", len(finite) < len(readings)
        stop_kimg = ledger.stop_kimg(record.params)
        if stop_kimg is not None:
            finite = {kimg: scores for kimg, scores in finite.items() if kimg <= stop_kimg}
        if asha and record.state == "running" and finite and search.runs.total_kimg not in finite:
            del finite[max(finite)]
        stopped = diverged or (asha and record.state == "stopped")
        search.recall(params, finite, stop_kimg=stop_kimg, stopped=stopped)


class Watch:
    """Looks after a search while it goes on: what it knows of the speed, and whether its rungs agree.

    Args:
        ctx: The search.
        ledger: Its trials.
        search: Chooses C; None where there is nothing to choose.
        account: What may be trained.
    """

    def __init__(self, ctx: Context, ledger: Ledger, search: GranularitySearch | None, account: Account) -> None:
        self._ctx, self._ledger, self._search, self._account = ctx, ledger, search, account
        self._warned, self._short_told = False, False
        self._told: dict[tuple[int, int], int] = {}

    def scored(self) -> None:
        """A trial has scored."""
        speed = self._account.measure(self._ledger.records)
        if speed is not None:
            said = f"  {speed.images_per_s:,.0f} images/s in a training, scoring included"
            if self._search is not None:
                said += f": the search over C may train {mimg(self._account.allowed_kimg())}"
            self._ctx.terminal.line(said)
        if self._search is not None and self._account.short and not self._short_told:
            self._short_told = True
            self._ctx.terminal.line(
                "  warning: the budget does not hold one training beside the rest; one is made all the same", "yellow"
            )
        self._compare_rungs()

    def _compare_rungs(self) -> None:
        """Rank correlations of early with late rungs go to MLflow as they come; a bad one is told once."""
        if self._search is None:
            return
        readings: dict[Hashable, dict[int, float]] = {
            key: {kimg: scores[0] for kimg, scores in run.readings.items()} for key, run in enumerate(self._search.runs)
        }
        agreements = rank_agreement(readings, self._search.plan.rungs_kimg)
        tracker = self._ctx.tracker
        for each in agreements:
            pair = each.low_kimg, each.high_kimg
            if self._told.get(pair) != each.num_runs:
                self._told[pair] = each.num_runs
                name = f"rank_correlation_{each.low_kimg}_{each.high_kimg}_kimg"
                tracker.points(tracker.parent_key, {name: each.spearman}, step=each.num_runs)
        bad = disagreement(agreements)
        if bad is not None and not self._warned:
            self._warned = True
            self._ctx.terminal.line(
                f"  warning: {bad.sentence()}; early scores say little here: raise --granularity.grace-kimg", "yellow"
            )

    def outlook(self) -> str:
        """How far the stage is, for the terminal: what of the budget is spent, and about how long the rest takes."""
        if self._search is None:
            return ""
        # Another thread asks while the search goes on: over a copy of its runs, which may grow meanwhile.
        runs, allowed = list(self._search.runs), self._search.allowed_kimg
        spent = sum(run.charged_kimg for run in runs)
        said = f"C tried: {len(runs)}, {mimg(spent)} of {mimg(allowed)}"
        speed = self._account.speed
        if speed is not None:
            left_s = speed.wall_hours(max(allowed - spent, 0), 0) * 3600
            said += f", at most about {duration(left_s)} left"
        return said
