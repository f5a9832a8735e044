"""The stages of a search in their order: embeddings, C_max, the search below it, the best C to the full budget."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cedm_ray.clustering.clustering_io import MOSAIC_FILE
from cedm_ray.clustering.knn_accuracy import knn_accuracy
from cedm_ray.errors import UserError
from cedm_ray.granularity.budget import Workload
from cedm_ray.settings import SEARCHED
from cedm_ray.stages.budget.account import Account
from cedm_ray.stages.budget.speeds import Speeds
from cedm_ray.stages.budget.spending import Spent, costs, workload
from cedm_ray.stages.confidence import make_confidence
from cedm_ray.stages.context import Context
from cedm_ray.stages.decide import Decision, confirm, decide
from cedm_ray.stages.final import train_final
from cedm_ray.stages.granularity import grid, search_granularity, trials_at_once
from cedm_ray.stages.inputs.embed import Embeddings, embed, find_neighbors
from cedm_ray.stages.inputs.groupings import given_groupings
from cedm_ray.stages.inputs.scoring import Scoring, prepare_scoring
from cedm_ray.stages.lower_bound import find_lower_bound
from cedm_ray.stages.results.bounds import LowerBound, UpperBound
from cedm_ray.stages.results.result import SearchResult
from cedm_ray.stages.results.result_file import write_result, write_so_far
from cedm_ray.stages.show.progress import DecisionFacts
from cedm_ray.stages.show.terminal import Terminal
from cedm_ray.stages.tracking.tracker import ui_command
from cedm_ray.stages.training.ledger import Ledger
from cedm_ray.stages.training.records import FinalScore
from cedm_ray.stages.training.trial_job import Planner
from cedm_ray.stages.upper_bound import find_upper_bound

VOTING_NEIGHBORS = 20


def find_visual_groups(ctx: Context) -> SearchResult:
    """Run every stage; what an earlier run of the same search has done is read.

    Raises:
        UserError: If no number of clusters could be trained to the end.
    """
    config, terminal, board = ctx.config, ctx.terminal, ctx.board
    with terminal.stage(f"embedding {len(ctx.packed):,} images with {config.backbone}", board):
        embeddings = embed(ctx)
        find_neighbors(ctx, embeddings)
    _tell_embeddings(ctx, embeddings)
    with terminal.stage("preparing the score", board):
        scoring = prepare_scoring(ctx, embeddings)
    with terminal.stage("preparing the groups to compare with", board):
        given = given_groupings(ctx)
    upper = _upper_bound(ctx, embeddings)
    lower = _lower_bound(ctx, embeddings, upper)
    points = _points(ctx, upper, lower)
    ledger = Ledger(
        ctx,
        Planner(
            config=config,
            store=ctx.store,
            embedding_inputs=embeddings.inputs,
            images=ctx.images,
            images_sha256=ctx.packed.facts.pixels_sha256,
            given=given,
            scoring=scoring,
        ),
    )
    account = _open_account(ctx, len(grid(points, config.granularity.grid_points)) if points else 0)
    for name, text in account.plan().lines():
        terminal.line(f"  {name:>9}  {text}")
    base = _base(ctx, scoring, upper, lower, points)
    ledger.on_change = lambda: write_so_far(ctx, base, ledger.records)
    search_granularity(ctx, ledger, points, embeddings, account)
    decision = _decided(ctx, ledger, embeddings, account, confirming=bool(config.confirm and points))
    final = train_final(ctx, ledger, decision, embeddings)
    job = ledger.planner.job(decision.best.params, total_kimg=config.final.total_kimg)
    with terminal.stage("ranking samples by confidence", board):
        confidence = make_confidence(ctx, ledger, job, Path(final.export))
    result = _result(ctx, base, ledger, decision, final, confidence, account.work)
    write_result(ctx, result)
    return result


def _points(ctx: Context, upper: UpperBound | None, lower: LowerBound | None) -> range:
    """The numbers of clusters to search over; none where C is given."""
    if upper is None:
        return range(0)
    return range(lower.start if lower is not None and ctx.config.bound.from_lower else 2, upper.end)


def _decided(ctx: Context, ledger: Ledger, embeddings: Embeddings, account: Account, *, confirming: bool) -> Decision:
    """The decision from what was trained, and where it is to be confirmed from the retrainings too.

    Raises:
        UserError: If no trial was trained to the end.
    """
    config, metrics = ctx.config, ledger.planner.scoring.metrics
    # Without what an earlier process has retrained: what is to be retrained must not depend on it.
    decision = decide([record for record in ledger.records if "train_seed" not in record.params], config, metrics)
    if decision is None:
        raise UserError(f"no trial was trained to the end; the reasons stand above and in {ctx.folder / 'search.log'}")
    _tell_decision(ctx.terminal, decision)
    if confirming:
        confirm(ctx, ledger, decision, embeddings, account)
        decision = decide(ledger.records, config, metrics) or decision
        _tell_decision(ctx.terminal, decision)
    return decision


def _open_account(ctx: Context, grid_points: int) -> Account:
    """What the search over C may train, from the settings and from what is known of the speed."""
    config, at_once = ctx.config, trials_at_once(ctx)
    work = workload(config, has_labels=ctx.packed.class_labels is not None, grid_points=grid_points)
    speeds = Speeds(ctx.folder.parent, config, ctx.packed.resolution)
    known = speeds.known(gpus=ctx.shares.gpus_per_worker > 0)
    return Account(config, work, known, at_once, ctx.terminal.started_s, speeds)


def _base(
    ctx: Context, scoring: Scoring, upper: UpperBound | None, lower: LowerBound | None, points: range
) -> dict[str, Any]:
    """What of the result is known before the first training."""
    config = ctx.config
    return {
        "name": ctx.folder.name,
        "folder": str(ctx.folder),
        "grouping": config.grouping,
        "metric": scoring.metric,
        "metrics": scoring.metrics,
        "scored": asdict(scoring.facts),
        "images_sha256": ctx.packed.facts.pixels_sha256,
        "num_images": config.score.num_images,
        "total_kimg": config.granularity.total_kimg,
        "cutoff": config.bound.cutoff,
        "upper_bound": upper,
        "lower_bound": lower,
        "searched": (points.start, points.stop) if points else None,
        "tracking_uri": ctx.tracker.uri,
        "ui_command": ui_command(ctx.tracker.uri),
        "run_id": _run_id(ctx),
    }


def _result(
    ctx: Context,
    base: dict[str, Any],
    ledger: Ledger,
    decision: Decision,
    final: FinalScore,
    confidence: Path | None,
    work: Workload,
) -> SearchResult:
    """All that the search has found."""
    # MLflow's id may have become known since the search began.
    named = {"run_id": _run_id(ctx), "page": ctx.tracker.page(ctx.tracker.parent_key)}
    records = ledger.records
    return SearchResult(
        **base | named,
        trials=tuple(records),
        best=decision.ties.best,
        tie_set=decision.ties,
        pareto=decision.pareto,
        final=final,
        mosaics=_mosaics(ledger),
        confidence=None if confidence is None else str(confidence),
        costs=costs(Spent.of(records), work),
    )


def _run_id(ctx: Context) -> str:
    """MLflow's id of the search's run, or our key of it while MLflow has not said it."""
    return ctx.tracker.run_id(ctx.tracker.parent_key) or ctx.tracker.parent_key


def _mosaics(ledger: Ledger) -> dict[int, str]:
    """Pictures of the clusterings by C."""
    clusterings = [ledger.planner.job(record.params).clustering for record in ledger.records]
    pictures = [(each.num_clusters, each.path / MOSAIC_FILE) for each in clusterings if each is not None]
    return {num_clusters: str(picture) for num_clusters, picture in pictures if picture.is_file()}


def _tell_embeddings(ctx: Context, embeddings: Embeddings) -> None:
    """Show and log how well the embeddings tell the classes apart, where there are any; nothing is decided by it."""
    labels = ctx.packed.class_labels
    if labels is None:
        return
    votes = min(VOTING_NEIGHBORS, ctx.config.num_neighbors)
    accuracy = knn_accuracy(embeddings.neighbors, labels, votes)
    ctx.tracker.metrics(ctx.tracker.parent_key, {f"knn_accuracy_{votes}": accuracy}, kimg=0)
    ctx.terminal.line(f"the embeddings' {votes} nearest neighbours name {accuracy:.1%} of the labels")


def _tell_decision(terminal: Terminal, decision: Decision) -> None:
    ties = decision.ties
    facts = DecisionFacts(ties.best, tuple(ties.clusters), ties.smallest)
    terminal.line(decision.sentence(), style="bold", facts=facts)


def _upper_bound(ctx: Context, embeddings: Embeddings) -> UpperBound | None:
    """C_max where C is searched over."""
    config, terminal = ctx.config, ctx.terminal
    if config.grouping not in SEARCHED:
        return None
    with terminal.stage(f"searching C_max: the first C with r_C at or below {config.bound.cutoff:g}", ctx.board):
        bound = find_upper_bound(ctx, embeddings)
    terminal.line(bound.sentence(config.temi.num_heads * config.temi.epochs), style="bold")
    return bound


def _lower_bound(ctx: Context, embeddings: Embeddings, upper: UpperBound | None) -> LowerBound | None:
    """The paper's lower bound, where it is asked for."""
    if upper is None or not ctx.config.bound.lower:
        return None
    with ctx.terminal.stage("searching the lower bound: the clusters that are used at gamma 1", ctx.board):
        found = find_lower_bound(ctx, embeddings, upper.end)
    ctx.terminal.line(found.sentence(), style="bold")
    return found
