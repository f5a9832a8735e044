"""The stages of a search in their order: embeddings, C_max, the search below it, the best C to the full budget."""

from __future__ import annotations

from dataclasses import asdict

import ray

from cedm_ray.errors import UserError
from cedm_ray.stages.context import Context
from cedm_ray.stages.embed import Embeddings, embed, neighbors
from cedm_ray.stages.final import train_final
from cedm_ray.stages.granularity import Ledger, best_of, search_granularity
from cedm_ray.stages.groupings import keep_labels
from cedm_ray.stages.plan import Planner
from cedm_ray.stages.result import SearchResult, write_result
from cedm_ray.stages.scoring import Scoring, prepare_scoring
from cedm_ray.stages.tracking import ui_command
from cedm_ray.stages.upper_bound import find_upper_bound


def find_visual_groups(ctx: Context) -> SearchResult:
    """Run every stage; what an earlier run of the same search has done is read.

    Raises:
        UserError: If no number of clusters could be trained to the end.
    """
    config, terminal, board = ctx.config, ctx.terminal, ctx.board
    with terminal.stage(f"embedding {len(ctx.packed):,} images with {config.backbone}", board):
        embeddings = embed(ctx)
        nearest = neighbors(ctx, embeddings)
    with terminal.stage("preparing the score", board):
        scoring = prepare_scoring(ctx, embeddings)
    with terminal.stage(f"searching C_max: the first C with r_C at or below {config.bound.cutoff:g}", board):
        bound = find_upper_bound(ctx, embeddings, nearest)
    terminal.line(f"C_max is {bound.c_max} (probes: {len(bound.probes)})", style="bold")
    data = {"embeddings": ray.put(embeddings.values), "neighbors": ray.put(nearest)}
    ledger = Ledger(ctx, _planner(ctx, embeddings, scoring))
    best = best_of(search_granularity(ctx, ledger, bound.c_max, data), config.granularity.total_kimg)
    if best is None:
        raise UserError(f"no trial was trained to the end; the reasons stand above and in {ctx.folder / 'search.log'}")
    terminal.line(f"the best number of clusters is {best.num_clusters}", style="bold")
    final = train_final(ctx, ledger, best, data)
    result = SearchResult(
        name=ctx.folder.name,
        folder=str(ctx.folder),
        metric=scoring.metric,
        scored=asdict(scoring.facts),
        num_images=config.score.num_images,
        total_kimg=config.granularity.total_kimg,
        cutoff=config.bound.cutoff,
        c_max=bound.c_max,
        outcome=bound.outcome,
        probes=bound.probes,
        trials=tuple(ledger.records),
        best=best.num_clusters,
        final=final,
        tracking_uri=ctx.tracker.uri,
        ui_command=ui_command(ctx.tracker.uri),
        run_id=ctx.tracker.parent_id,
    )
    write_result(ctx, result)
    return result


def _planner(ctx: Context, embeddings: Embeddings, scoring: Scoring) -> Planner:
    packed, labels = ctx.packed, None
    if packed.class_labels is not None and packed.num_classes is not None:
        labels = keep_labels(packed.class_labels, packed.num_classes, packed.facts.pixels_sha256, ctx.store)
    return Planner(
        config=ctx.config,
        store=ctx.store,
        embedding_inputs=embeddings.inputs,
        images=ctx.images,
        images_sha256=packed.facts.pixels_sha256,
        labels=labels,
        num_classes=packed.num_classes,
        scoring=scoring,
    )
