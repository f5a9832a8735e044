"""C_max by clustering alone: Tune runs TEMI trials that a pure ask/tell search proposes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.tune
from ray.tune.search import Searcher

from cedm_ray.clustering.upper_bound import UpperBoundSearch
from cedm_ray.config import SearchConfig
from cedm_ray.errors import UserError
from cedm_ray.stages import groupings
from cedm_ray.stages.board import Board
from cedm_ray.stages.cluster import Shares
from cedm_ray.stages.driver_only import DriverCallback
from cedm_ray.stages.embed import Embeddings
from cedm_ray.stages.groupings import ClusteringJob, clustering_job
from cedm_ray.stages.progress import Terminal
from cedm_ray.stages.store import Store, write_json

if TYPE_CHECKING:  # MLflow takes seconds to import, and only the driver needs it
    from cedm_ray.stages.tracking import Tracker

MAX_RETRIES = 2


@dataclass(frozen=True)
class UpperBound:
    """What clustering alone says: no C at or above ``c_max`` is worth training."""

    c_max: int
    outcome: str
    """``found``, or ``capped`` where even the largest number of clusters is used well."""
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


def run_probe(
    config: Mapping[str, Any], jobs: Any, embeddings: np.ndarray, neighbors: np.ndarray, cpus: float, board: Board
) -> None:
    """The Tune function of a probe: fit (or find) one clustering and report its r_C."""
    job: ClusteringJob = jobs(config["num_clusters"])
    facts = groupings.fit(job, embeddings, neighbors, cpus, board)
    ray.tune.report({name: facts[name] for name in ("utilization_ratio", "num_used", "num_clusters", "seconds")})


@dataclass(frozen=True)
class ProbeJobs:
    """Gives the clustering job of a number of clusters; small enough to travel to every trial."""

    config: SearchConfig
    embedding_inputs: dict[str, Any]
    store: Store

    def __call__(self, num_clusters: int) -> ClusteringJob:
        return clustering_job(self.config, self.embedding_inputs, num_clusters, self.store)


class ProbeCallback(DriverCallback):
    """Tells the terminal and MLflow of every probe."""

    def __init__(self, terminal: Terminal, tracker: Tracker, jobs: ProbeJobs, cutoff: float) -> None:
        self._terminal, self._tracker, self._jobs, self._cutoff = terminal, tracker, jobs, cutoff

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        tell_probe(trial.last_result, self._terminal, self._tracker, self._jobs, self._cutoff)


def tell_probe(facts: Mapping[str, Any], terminal: Terminal, tracker: Tracker, jobs: ProbeJobs, cutoff: float) -> None:
    """One line on the terminal and one child run in MLflow for a probe that is done."""
    num_clusters, ratio = int(facts["num_clusters"]), float(facts["utilization_ratio"])
    side = "above" if ratio > cutoff else "at or below"
    terminal.line(f"  C={num_clusters}: {facts['num_used']} clusters used, r_C {ratio:.4f}, {side} {cutoff:g}")
    job = jobs(num_clusters)
    run = tracker.child(
        f"probe/{job.path.name}",
        f"probe C={num_clusters}",
        {"num_clusters": num_clusters, "temi.seed": job.seed},
        {"stage": "upper_bound", "C": num_clusters, "grouping": "temi"},
    )
    tracker.metrics(
        run, {"utilization_ratio": ratio, "num_used": facts["num_used"], "seconds": facts["seconds"]}, kimg=0
    )
    tracker.artifact(run, job.file, "clustering")
    tracker.end(run, "complete")


def find_upper_bound(
    config: SearchConfig,
    embeddings: Embeddings,
    neighbors: np.ndarray,
    store: Store,
    folder: Path,
    shares: Shares,
    terminal: Terminal,
    tracker: Tracker,
    board: Board,
) -> UpperBound:
    """Find C_max; probes whose clustering is stored are read, not run.

    Args:
        config: The settings of the search.
        embeddings: The embeddings.
        neighbors: Neighbours, shape ``(N, k)``.
        store: Where clusterings are kept.
        folder: Of the run; ``upper_bound.json`` goes there.
        shares: What to ask for of the cluster.
        terminal: Where people see the probes.
        tracker: Where MLflow sees them.
        board: Where processes tell how far they are.

    Raises:
        UserError: If no number of clusters is left to train.
    """
    jobs = ProbeJobs(config, embeddings.inputs, store)
    settings = config.bound
    largest = len(embeddings.values)
    search = _told(
        lambda: UpperBoundSearch(
            min(settings.c_start, largest), settings.cutoff, resolution=settings.resolution, max_clusters=largest
        ),
        jobs,
        store,
        terminal,
        tracker,
    )
    if not search.done:
        searcher = ProbeSearcher(search)
        _run(
            searcher,
            jobs,
            embeddings.values,
            neighbors,
            folder,
            shares,
            ProbeCallback(terminal, tracker, jobs, settings.cutoff),
            board,
        )
        if not search.done:
            raise RuntimeError(f"clustering failed {searcher.failures} times; see {folder / 'ray'} for the reason")
    if search.c_max is None or search.outcome == "empty":
        raise UserError(
            f"even 2 clusters are not all used (r_C at or below bound.cutoff {settings.cutoff:g}): "
            f"these embeddings hold no groups; try another --backbone"
        )
    found = UpperBound(search.c_max, search.outcome, tuple(search.probes))
    write_json(folder / "upper_bound.json", {"c_max": found.c_max, "outcome": found.outcome, "probes": found.probes})
    return found


def _told(
    new_search: Callable[[], UpperBoundSearch], jobs: ProbeJobs, store: Store, terminal: Terminal, tracker: Tracker
) -> UpperBoundSearch:
    """A search that knows every stored reading that it would ask for."""
    rehearsal, search = new_search(), new_search()
    while (num_clusters := rehearsal.ask()) is not None:
        facts = store.facts(jobs(num_clusters).path)
        if facts is None:
            break
        for each in (rehearsal, search):
            each.tell(num_clusters, facts["utilization_ratio"])
        tell_probe(facts, terminal, tracker, jobs, search.cutoff)
    return search


def _run(
    searcher: ProbeSearcher,
    jobs: ProbeJobs,
    embeddings: np.ndarray,
    neighbors: np.ndarray,
    folder: Path,
    shares: Shares,
    callback: ProbeCallback,
    board: Board,
) -> None:
    # Embeddings and neighbours lie in shared memory once; trials see read-only views of them.
    probe = ray.tune.with_parameters(
        run_probe, jobs=jobs, embeddings=embeddings, neighbors=neighbors, cpus=shares.cpus_per_probe, board=board
    )
    resources = {"CPU": shares.cpus_per_probe, "GPU": shares.gpus_per_probe}
    ray.tune.Tuner(
        ray.tune.with_resources(probe, {name: amount for name, amount in resources.items() if amount}),
        tune_config=ray.tune.TuneConfig(search_alg=searcher, num_samples=-1),
        run_config=ray.tune.RunConfig(
            name="upper_bound",
            storage_path=str(folder / "ray"),
            verbose=0,
            callbacks=[callback],
        ),
    ).fit()
