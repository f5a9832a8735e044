"""The paper's lower bound: how many clusters TEMI uses at gamma 1, where nothing keeps them from emptying."""

from __future__ import annotations

from dataclasses import asdict, replace

import ray

from cedm_ray.errors import UserError
from cedm_ray.stages.context import Context
from cedm_ray.stages.inputs import clusterings
from cedm_ray.stages.inputs.clusterings import clustering_job
from cedm_ray.stages.inputs.embed import Embeddings
from cedm_ray.stages.probes import tell_probe
from cedm_ray.stages.results.bounds import LowerBound
from cedm_ray.stages.storage.store import write_json

OVERESTIMATES = (1.5, 2.0, 3.0)


def find_lower_bound(ctx: Context, embeddings: Embeddings, end: int) -> LowerBound:
    """Cluster at gamma 1 from several overestimates of C; what is stored is read.

    Args:
        ctx: The search; ``lower_bound.json`` goes into its folder.
        embeddings: The embeddings and their neighbours.
        end: Upper end of the search over C, from which the overestimates are made where none are given.

    Raises:
        UserError: If C is to be searched from the lower bound and nothing is left below ``end``.

    Source: arXiv 2403.00570, Sec. 3.3.
    """
    config, largest = ctx.config, len(ctx.packed)
    wanted = config.bound.lower_clusters or tuple(round(factor * end) for factor in OVERESTIMATES)
    at_gamma_1 = config.model_copy(update={"temi": replace(config.temi, gamma=1.0)})
    jobs = [
        clustering_job(at_gamma_1, embeddings.inputs, ctx.images, clusters, ctx.store)
        for clusters in sorted({min(clusters, largest) for clusters in wanted})
    ]
    shares = ctx.shares
    task = ray.remote(clusterings.fit).options(num_cpus=shares.cpus_per_probe, num_gpus=shares.gpus_per_probe)
    running = {task.remote(job, embeddings, shares.cpus_per_probe, ctx.board): job for job in jobs}
    used = []
    waiting = list(running)
    while waiting:
        (done,), waiting = ray.wait(waiting)
        job, facts = running[done], ray.get(done)
        tell_probe(ctx, job, facts, "lower_bound")
        used.append((job.num_clusters, int(facts["num_used"])))
    found = LowerBound(tuple(sorted(used)))
    write_json(ctx.folder / "lower_bound.json", {**asdict(found), "mean": found.mean, "std": found.std})
    tracker = ctx.tracker
    for name, value in (("lower_bound", found.mean), ("lower_bound_std", found.std)):
        tracker.series(tracker.parent_key, name, [value])  # once, however often the search goes on
    if config.bound.from_lower and found.start >= end:
        raise UserError(
            f"{found.sentence()}: nothing lies between {found.start} and {end}, the upper end of C_max's interval; "
            f"leave out --bound.from-lower"
        )
    return found
