"""The decision: the best number of clusters, those that noise cannot tell from it, and retrainings that tell more."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean

from cedm_ray.config import SearchConfig
from cedm_ray.granularity.decision import TieSet, Trained, pareto_front, tie_set
from cedm_ray.settings import SEARCHED
from cedm_ray.stages.budget.account import Account
from cedm_ray.stages.cluster.waiting import Places
from cedm_ray.stages.context import Context
from cedm_ray.stages.inputs.embed import Embeddings
from cedm_ray.stages.training.ledger import Ledger
from cedm_ray.stages.training.records import TrialRecord
from cedm_ray.stages.training.trials import TrialSource, tune_trials

Scored = tuple[TrialRecord, tuple[float, ...]]
"""A training that reached the end of the search, and the scores of its sets of images there."""


@dataclass(frozen=True)
class Decision:
    """What the trials say."""

    best: TrialRecord
    """The training to go on with: of the best C, the one with the lowest score."""
    ties: TieSet
    pareto: tuple[int, ...] | None
    """Numbers of clusters that no other one beats in all scores, where several are minimised."""

    def sentence(self) -> str:
        """The decision in words."""
        ties = self.ties
        if self.best.grouping not in SEARCHED:
            return f"{self.best.label} is trained to the end of the search: score {ties.low:.4g}"
        if len(ties.clusters) == 1:
            return f"the best number of clusters is {ties.best}; no other one that was trained to the end ties with it"
        return (
            f"the best number of clusters is {ties.best}; {', '.join(map(str, ties.clusters))} tie (within "
            f"{ties.margin:.1%}, what trainings scatter), the smallest of them is {ties.smallest}"
        )


def score_at(record: TrialRecord, config: SearchConfig, metrics: Sequence[str]) -> tuple[float, ...] | None:
    """The scores of a training's sets of images at the end of the search; None where it did not come so far.

    Where several metrics are minimised it is their geometric mean.
    """
    rung = next((rung for rung in record.rungs if rung["kimg"] == config.granularity.total_kimg), None)
    if rung is None:
        return None
    if config.granularity.multi_objective:
        values = tuple(float(rung[name]) for name in metrics)
    else:
        values = tuple(float(value) for value in rung.get("score_sets") or (rung["score"],))
    if not all(math.isfinite(value) and value > 0 for value in values):
        return None
    return (geometric_mean(values),) if config.granularity.multi_objective else values


def decide(records: Sequence[TrialRecord], config: SearchConfig, metrics: Sequence[str]) -> Decision | None:
    """The decision from the trials of the search's own grouping that were trained to the end; None if there are none.

    Where other settings are searched over too, a C stands with the settings under which it scored best.
    """
    standing = _standing(records, config, metrics)
    if not standing:
        return None
    ties = tie_set(
        [Trained(num_clusters, scores) for num_clusters, group in standing.items() for _, scores in group],
        retrain_spread=config.granularity.retrain_spread,
    )
    best = min(standing[ties.best], key=lambda each: fmean(each[1]))[0]
    pareto = None
    if config.granularity.multi_objective:
        pareto = pareto_front({c: _at_the_end(group, config, metrics) for c, group in standing.items()})
    return Decision(best, ties, pareto)


def _standing(records: Sequence[TrialRecord], config: SearchConfig, metrics: Sequence[str]) -> dict[int, list[Scored]]:
    """For each C its trainings under the settings with the lowest mean score, in the order of the records."""
    groups: dict[tuple[int, str], list[Scored]] = defaultdict(list)
    for record in records:
        scores = score_at(record, config, metrics) if record.grouping == config.grouping else None
        if scores is not None:
            others = {name: value for name, value in record.params.items() if name != "train_seed"}
            groups[record.num_clusters, repr(sorted(others.items()))].append((record, scores))
    standing: dict[int, list[Scored]] = {}
    for (num_clusters, _), group in groups.items():
        if num_clusters not in standing or _mean(group) < _mean(standing[num_clusters]):
            standing[num_clusters] = group
    return standing


def _mean(group: Sequence[Scored]) -> float:
    return fmean(fmean(scores) for _, scores in group)


def _at_the_end(group: Sequence[Scored], config: SearchConfig, metrics: Sequence[str]) -> tuple[float, ...]:
    """The mean of each score over the trainings of one C."""
    end = config.granularity.total_kimg
    rungs = [next(rung for rung in record.rungs if rung["kimg"] == end) for record, _ in group]
    return tuple(fmean(float(rung[name]) for rung in rungs) for name in metrics)


def confirm(ctx: Context, ledger: Ledger, decision: Decision, embeddings: Embeddings, account: Account) -> None:
    """Retrain every C of the tie set with fresh seeds, under its best settings, as far as the budget holds.

    The C of the lowest score comes first; what is stored is not repeated.
    """
    config = ctx.config
    # By the first trainings alone: retrainings that an earlier process has made do not change what is wanted.
    first = [record for record in ledger.records if "train_seed" not in record.params]
    standing = _standing(first, config, ledger.planner.scoring.metrics)
    wanted = [
        {**standing[num_clusters][0][0].params, "train_seed": config.seed + 1 + repeat}
        for repeat in range(config.confirm)
        for num_clusters in sorted(decision.ties.clusters, key=lambda c: _mean(standing[c]))
    ]
    complete = [record.params for record in ledger.records if record.state == "complete"]
    missing = [params for params in wanted if params not in complete]
    room = account.retrainings(ledger.records)
    if room is not None and room < len(missing):
        ctx.terminal.line(f"the budget holds {room} of {len(missing)} retrainings", "yellow")
        missing = missing[:room]
    if not missing:
        return
    clusters = ", ".join(str(c) for c in sorted({params["num_clusters"] for params in missing}))
    with ctx.terminal.stage(f"retraining C = {clusters} with fresh seeds", ctx.board):
        source, places = TrialSource(ledger, missing), Places(ctx.shares, ctx.config.granularity.max_concurrent)
        tune_trials(ctx, ledger, "confirm", embeddings, source, at_once=places)
