"""The stages of a search in their order: embeddings, C_max, the search below it, the best C to the full budget."""

from __future__ import annotations

from dataclasses import asdict

from cedm_ray.clustering.knn_accuracy import knn_accuracy
from cedm_ray.errors import UserError
from cedm_ray.settings import SEARCHED
from cedm_ray.stages.context import Context
from cedm_ray.stages.embed import Embeddings, embed, find_neighbors
from cedm_ray.stages.final import train_final
from cedm_ray.stages.granularity import Ledger, best_of, search_granularity
from cedm_ray.stages.groupings import given_groupings
from cedm_ray.stages.plan import Planner
from cedm_ray.stages.result import SearchResult, write_result
from cedm_ray.stages.scoring import prepare_scoring
from cedm_ray.stages.tracking import ui_command
from cedm_ray.stages.upper_bound import UpperBound, find_upper_bound

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
    bound = _bound(ctx, embeddings)
    c_max = None if bound is None else bound.c_max
    planner = Planner(
        config=config,
        store=ctx.store,
        embedding_inputs=embeddings.inputs,
        images=ctx.images,
        images_sha256=ctx.packed.facts.pixels_sha256,
        given=given,
        scoring=scoring,
    )
    ledger = Ledger(ctx, planner)
    records = search_granularity(ctx, ledger, c_max, embeddings)
    best = best_of(records, config.granularity.total_kimg, config.grouping)
    if best is None:
        raise UserError(f"no trial was trained to the end; the reasons stand above and in {ctx.folder / 'search.log'}")
    terminal.line(f"the best number of clusters is {best.num_clusters}", style="bold")
    final = train_final(ctx, ledger, best, embeddings)
    result = SearchResult(
        name=ctx.folder.name,
        folder=str(ctx.folder),
        grouping=config.grouping,
        metric=scoring.metric,
        scored=asdict(scoring.facts),
        num_images=config.score.num_images,
        total_kimg=config.granularity.total_kimg,
        cutoff=config.bound.cutoff,
        c_max=c_max,
        outcome=bound.outcome if bound else "given",
        probes=bound.probes if bound else (),
        trials=tuple(ledger.records),
        best=best.num_clusters,
        final=final,
        tracking_uri=ctx.tracker.uri,
        ui_command=ui_command(ctx.tracker.uri),
        run_id=ctx.tracker.parent_id,
    )
    write_result(ctx, result)
    return result


def _tell_embeddings(ctx: Context, embeddings: Embeddings) -> None:
    """How well the embeddings tell the classes apart, where there are any; nothing but the log hears of it."""
    labels = ctx.packed.class_labels
    if labels is None:
        return
    votes = min(VOTING_NEIGHBORS, ctx.config.num_neighbors)
    accuracy = knn_accuracy(embeddings.neighbors, labels, votes)
    ctx.tracker.metrics(ctx.tracker.parent_id, {f"knn_accuracy_{votes}": accuracy}, kimg=0)
    ctx.terminal.line(f"the embeddings' {votes} nearest neighbours name {accuracy:.1%} of the labels")


def _bound(ctx: Context, embeddings: Embeddings) -> UpperBound | None:
    """C_max where C is searched over."""
    config, terminal = ctx.config, ctx.terminal
    if config.grouping not in SEARCHED:
        return None
    with terminal.stage(f"searching C_max: the first C with r_C at or below {config.bound.cutoff:g}", ctx.board):
        bound = find_upper_bound(ctx, embeddings)
    said = "as given" if bound.outcome == "given" else f"probes: {len(bound.probes)}"
    terminal.line(f"C_max is {bound.c_max} ({said})", style="bold")
    return bound
