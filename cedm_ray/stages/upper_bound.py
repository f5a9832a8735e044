"""C_max by clustering alone: Tune runs TEMI trials that a pure ask/tell search proposes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune.search import Searcher

from cedm_ray.clustering.upper_bound import UpperBoundSearch
from cedm_ray.config import KMEANS_HAS_NO_BOUND, SearchConfig
from cedm_ray.errors import UserError
from cedm_ray.stages import groupings
from cedm_ray.stages.board import Board
from cedm_ray.stages.context import Context
from cedm_ray.stages.driver_only import DriverCallback
from cedm_ray.stages.embed import Embeddings
from cedm_ray.stages.groupings import ClusteringJob, clustering_job
from cedm_ray.stages.store import Store, write_json

MAX_RETRIES = 2


@dataclass(frozen=True)
class UpperBound:
    """What clustering alone says: no C at or above ``c_max`` is worth training."""

    c_max: int
    outcome: str
    """``found``, ``capped`` where even the largest number of clusters is used well, or ``given`` by the settings."""
    probes: tuple[tuple[int, float], ...]
    """Readings (C, r_C) in the order in which they came."""


class ProbeSearcher(Searcher):
    """Lets an :class:`UpperBoundSearch` propose the trials of a Tune run.

    Args:
        search: The search; what it is told here it knows afterwards.
    """

    def __init__(self, search: UpperBoundSearch) -> None:
        super().__init__(metric="utilization_ratio", mode="max")
        self.search = search
        self._asked: dict[str, int] = {}
        self._again: list[int] = []
        self.failures = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        num_clusters = self._again.pop() if self._again else self.search.ask()
        if num_clusters is None:
            over = self.search.done or self.failures > MAX_RETRIES
            return Searcher.FINISHED if over and not self._asked else None
        self._asked[trial_id] = num_clusters
        return {"num_clusters": num_clusters}

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        num_clusters = self._asked.pop(trial_id, None)
        if num_clusters is None:
            return
        if result and not error:
            self.search.tell(num_clusters, result["utilization_ratio"])
            return
        self.failures += 1
        if self.failures <= MAX_RETRIES:
            self._again.append(num_clusters)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the readings are in the store, and a new search is told them."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see :meth:`save`."""


def run_probe(config: Mapping[str, Any], jobs: Any, embeddings: Embeddings, cpus: float, board: Board) -> None:
    """The Tune function of a probe: fit (or find) one clustering and report its r_C."""
    job: ClusteringJob = jobs(config["num_clusters"])
    facts = groupings.fit(job, embeddings, cpus, board)
    names = ("utilization_ratio", "num_used", "num_clusters", "seconds", "quality")
    ray.tune.report({name: facts[name] for name in names})


@dataclass(frozen=True)
class ProbeJobs:
    """Gives the clustering job of a number of clusters; small enough to travel to every trial."""

    config: SearchConfig
    embedding_inputs: dict[str, Any]
    images: Path
    store: Store

    def __call__(self, num_clusters: int) -> ClusteringJob:
        return clustering_job(self.config, self.embedding_inputs, self.images, num_clusters, self.store)


class ProbeCallback(DriverCallback):
    """Tells the terminal and MLflow of every probe."""

    def __init__(self, ctx: Context, jobs: ProbeJobs) -> None:
        self._ctx, self._jobs = ctx, jobs

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        tell_probe(self._ctx, self._jobs, trial.last_result)


def tell_probe(ctx: Context, jobs: ProbeJobs, facts: Mapping[str, Any]) -> None:
    """One line on the terminal and one child run in MLflow for a probe that is done."""
    num_clusters, ratio, cutoff = int(facts["num_clusters"]), float(facts["utilization_ratio"]), ctx.config.bound.cutoff
    side = "above" if ratio > cutoff else "at or below"
    ctx.terminal.line(f"  C={num_clusters}: {facts['num_used']} clusters used, r_C {ratio:.4f}, {side} {cutoff:g}")
    job, tracker = jobs(num_clusters), ctx.tracker
    run = tracker.child(
        f"probe/{job.path.name}",
        f"probe C={num_clusters}",
        {"num_clusters": num_clusters, "seed": job.seed},
        {"stage": "upper_bound", "C": num_clusters, "grouping": job.grouping},
    )
    tracker.metrics(run, {**facts["quality"], "seconds": facts["seconds"]}, kimg=0)
    tracker.artifact(run, job.file, "clustering")
    tracker.end(run, "complete")


def find_upper_bound(ctx: Context, embeddings: Embeddings) -> UpperBound:
    """Find C_max; probes whose clustering is stored are read, not run.

    Args:
        ctx: The search; ``upper_bound.json`` goes into its folder.
        embeddings: The embeddings and their neighbours.

    Raises:
        UserError: If no number of clusters is left to train, or if the grouping has no such bound.
    """
    if ctx.config.bound.c_max is not None:
        return UpperBound(ctx.config.bound.c_max, "given", ())
    if ctx.config.grouping == "kmeans":
        raise UserError(KMEANS_HAS_NO_BOUND)
    jobs = ProbeJobs(ctx.config, embeddings.inputs, ctx.images, ctx.store)
    search = _told(ctx, jobs)
    if not search.done:
        searcher = ProbeSearcher(search)
        _run(ctx, searcher, jobs, embeddings)
        if not search.done:
            raise RuntimeError(f"clustering failed {searcher.failures} times; see {ctx.folder / 'ray'} for the reason")
    if search.c_max is None or search.outcome == "empty":
        raise UserError(
            f"even 2 clusters are not all used (r_C at or below bound.cutoff {search.cutoff:g}): "
            f"these embeddings hold no groups; try another --backbone"
        )
    found = UpperBound(search.c_max, search.outcome, tuple(search.probes))
    write_json(ctx.folder / "upper_bound.json", asdict(found))
    return found


def _told(ctx: Context, jobs: ProbeJobs) -> UpperBoundSearch:
    """A search that knows every stored reading that it would ask for."""
    settings, largest = ctx.config.bound, len(ctx.packed)
    rehearsal, search = (
        UpperBoundSearch(settings.c_start, settings.cutoff, resolution=settings.resolution, max_clusters=largest)
        for _ in range(2)
    )
    while (num_clusters := rehearsal.ask()) is not None:
        facts = ctx.store.facts(jobs(num_clusters).path)
        if facts is None:
            break
        for each in (rehearsal, search):
            each.tell(num_clusters, facts["utilization_ratio"])
        tell_probe(ctx, jobs, facts)
    return search


def _run(ctx: Context, searcher: ProbeSearcher, jobs: ProbeJobs, embeddings: Embeddings) -> None:
    cpus, gpus = ctx.shares.cpus_per_probe, ctx.shares.gpus_per_probe
    probe = ray.tune.with_parameters(run_probe, jobs=jobs, embeddings=embeddings, cpus=cpus, board=ctx.board)
    ray.tune.Tuner(
        ray.tune.with_resources(probe, {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}),
        tune_config=ray.tune.TuneConfig(search_alg=searcher, num_samples=-1),
        run_config=ray.tune.RunConfig(
            name="upper_bound",
            storage_path=str(ctx.folder / "ray"),
            verbose=0,
            callbacks=[ProbeCallback(ctx, jobs)],
        ),
    ).fit()
