"""C_max by clustering alone: the search, told what is stored, goes on; what it found is kept and drawn."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from cedm_ray.clustering.paper_rule import PaperRule
from cedm_ray.clustering.probes import BoundSearch
from cedm_ray.clustering.upper_bound import UpperBoundSearch
from cedm_ray.consistency import KMEANS_HAS_NO_BOUND
from cedm_ray.errors import UserError
from cedm_ray.report.bound_figure import FittedCurve, ProbePoint, bound_figure
from cedm_ray.report.write import write_page
from cedm_ray.stages.context import Context
from cedm_ray.stages.inputs.embed import Embeddings
from cedm_ray.stages.probes import ProbeJobs, probes_at_once, run_probes, tell_probe
from cedm_ray.stages.results.bounds import UpperBound
from cedm_ray.stages.storage.store import write_json

FIGURE = "upper_bound.png"
_CURVE_POINTS = 80


def find_upper_bound(ctx: Context, embeddings: Embeddings) -> UpperBound:
    """Find C_max; probes whose clustering is stored are read, not run.

    Args:
        ctx: The search; ``upper_bound.json`` and ``upper_bound.png`` go into its folder.
        embeddings: The embeddings and their neighbours.

    Raises:
        UserError: If no number of clusters is left to train, or if the grouping has no such bound.
    """
    settings = ctx.config.bound
    if settings.c_max is not None:
        return UpperBound(settings.c_max, None, None, "given")
    if ctx.config.grouping == "kmeans":
        raise UserError(KMEANS_HAS_NO_BOUND)
    jobs = ProbeJobs(ctx.config, embeddings.inputs, ctx.images, ctx.store)
    search = _recalled(ctx, jobs)
    if not search.done:
        run_probes(ctx, search, jobs, embeddings, ctx.folder / "ray")
    upper = search.interval[1]
    if search.c_max is None or search.outcome == "empty":
        raise UserError(
            f"even 2 clusters are not all used (r_C at or below bound.cutoff {search.cutoff:g}): "
            f"these embeddings hold no groups; try another --backbone"
        )
    found = UpperBound(
        search.c_max,
        (search.interval[0], search.c_max if upper is None else upper),
        settings.confidence if isinstance(search, UpperBoundSearch) else None,
        search.outcome,
        tuple(jobs.record(reading.probe, reading.ratio) for reading in search.readings),
        _curve(search) if isinstance(search, UpperBoundSearch) else None,
    )
    _keep(ctx, found)
    return found


def _search(ctx: Context, jobs: ProbeJobs) -> BoundSearch:
    settings, largest = ctx.config.bound, len(ctx.packed)
    if settings.rule == "paper":
        return PaperRule(settings.c_start, settings.cutoff, resolution=settings.resolution, max_clusters=largest)
    return UpperBoundSearch(
        settings.c_start,
        settings.cutoff,
        max_clusters=largest,
        precision=settings.precision,
        resolution=settings.resolution,
        confidence=settings.confidence,
        max_probes=settings.max_probes,
        low_spread=settings.low_spread if jobs.has_low else None,
    )


def _recalled(ctx: Context, jobs: ProbeJobs) -> BoundSearch:
    """A search that knows every stored reading of the rounds that it would ask for."""
    # Two, because asking changes a search: a round that is only partly stored must still be asked for.
    rehearsal, search = _search(ctx, jobs), _search(ctx, jobs)
    while probes := rehearsal.ask(probes_at_once(ctx)):
        stored = {probe: facts for probe in probes if (facts := ctx.store.facts(jobs(probe).path)) is not None}
        if len(stored) < len(probes):
            break
        for probe, facts in stored.items():
            for each in (rehearsal, search):
                each.tell(probe, jobs.reading(facts))
            tell_probe(ctx, jobs(probe), facts, "upper_bound")
    return search


def _curve(search: UpperBoundSearch) -> FittedCurve:
    """The fit over the numbers of clusters that were tried, and a little beyond."""
    tried = [reading.probe.num_clusters for reading in search.readings]
    clusters = np.geomspace(max(2, min(tried) / 1.5), max(tried) * 1.5, _CURVE_POINTS)
    low, middle, high = (tuple(float(ratio) for ratio in line) for line in search.curve(clusters))
    return FittedCurve(tuple(float(c) for c in clusters), middle, low, high)


def _keep(ctx: Context, found: UpperBound) -> None:
    """The result as JSON, as a picture and in MLflow's parent run."""
    write_json(ctx.folder / "upper_bound.json", asdict(found))
    points = [ProbePoint(probe.num_clusters, probe.ratio, probe.fidelity) for probe in found.probes]
    figure = bound_figure(
        points,
        curve=found.curve,
        cutoff=ctx.config.bound.cutoff,
        c_max=found.c_max,
        interval=found.interval,
        confidence=found.confidence,
    )
    write_page(figure, ctx.folder / FIGURE)
    ctx.tracker.artifact(ctx.tracker.parent_key, ctx.folder / FIGURE)
