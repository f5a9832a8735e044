"""Clusterings trained for the sake of their r_C: Tune runs what a pure ask/tell search proposes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.search import Searcher

from cedm_ray.clustering.clustering_io import MOSAIC_FILE
from cedm_ray.clustering.probes import BoundSearch, Probe
from cedm_ray.config import SearchConfig
from cedm_ray.stages.cluster.board import Board
from cedm_ray.stages.context import Context
from cedm_ray.stages.inputs import clusterings
from cedm_ray.stages.inputs.clusterings import ClusteringJob, clustering_job
from cedm_ray.stages.inputs.embed import Embeddings
from cedm_ray.stages.results.bounds import ProbeRecord
from cedm_ray.stages.show.progress import ProbeFacts
from cedm_ray.stages.show.stopping import Stopping
from cedm_ray.stages.storage.disk_faults import find_fault
from cedm_ray.stages.storage.store import Store
from cedm_ray.stages.tracking.clusterings import track_clustering
from cedm_ray.stages.tracking.story import probe_page
from cedm_ray.stages.training.driver_only import DriverCallback
from cedm_ray.stages.training.interruptions import FAILED, Failure
from cedm_ray.stages.training.storage_watch import StorageWatch
from cedm_ray.stages.training.tune_run import run_settings

MAX_FAILURES = 2
"""Failures of probes that a search for C_max bears in all."""
TOLD = ("utilization_ratio", "num_used", "seconds", "quality", "head_losses", "head_utilization")


@dataclass(frozen=True)
class ProbeJobs:
    """Gives the clustering job of a probe; small enough to travel to every trial."""

    config: SearchConfig
    embedding_inputs: dict[str, Any]
    images: Path
    store: Store

    @property
    def has_low(self) -> bool:
        """Whether the cheap probes are cheaper than the full ones."""
        low = self.config.bound.low_heads
        return low is not None and low < self.config.temi.num_heads

    def __call__(self, probe: Probe) -> ClusteringJob:
        """The clustering of a probe; each repeat has the next seed, and the first full one is that of a trial."""
        temi = self.config.temi
        if probe.fidelity == "low" and self.config.bound.low_heads is not None:
            temi = replace(temi, num_heads=self.config.bound.low_heads)
        job = self.config.model_copy(update={"temi": temi, "seed": self.config.seed + probe.repeat})
        return clustering_job(job, self.embedding_inputs, self.images, probe.num_clusters, self.store)

    def reading(self, facts: Mapping[str, Any]) -> float:
        """What the search is told of a clustering.

        The heads of a training scatter as much as trainings do, and the chosen one is no different from the others in
        how many clusters it uses: their mean says far more than it alone, which is what the paper's rule reads.
        """
        paper = self.config.bound.rule == "paper"
        return float(facts["utilization_ratio"] if paper else facts["quality"]["mean_utilization_ratio"])

    def record(self, probe: Probe, ratio: float) -> ProbeRecord:
        job = self(probe)
        settings = job.settings
        return ProbeRecord(probe.num_clusters, ratio, probe.fidelity, job.seed, settings.num_heads, settings.epochs)


class ProbeSearcher(Searcher):
    """Lets a search for C_max propose the trials of a Tune run, in rounds.

    The next round is asked for when the last one is told: what is proposed then depends on the readings alone, and not
    on which of them came first.

    Args:
        search: The search; what it is told here it knows afterwards.
        at_once: Probes that the cluster can run side by side.
        stopping: When it is asked, no probe starts any more.
    """

    def __init__(self, search: BoundSearch, at_once: int = 1, stopping: Stopping | None = None) -> None:
        super().__init__(metric="reading", mode="max")
        self.search, self._at_once, self._stopping = search, at_once, stopping or Stopping()
        self._asked: dict[str, Probe] = {}
        self._round: list[Probe] = []
        self.failures, self.reason = 0, "see the log"

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        gives_up = self.failures > MAX_FAILURES or self._stopping.asked
        if not self._round and not self._asked and not gives_up:
            self._round = self.search.ask(self._at_once)
        if not self._round or gives_up:
            return None if self._asked else Searcher.FINISHED
        self._asked[trial_id] = self._round.pop(0)
        return asdict(self._asked[trial_id])

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        probe = self._asked.pop(trial_id, None)
        if probe is None:
            return
        if result and not error and FAILED not in result:
            self.search.tell(probe, result["reading"])
            return
        self.failures += 1
        self.reason = (result or {}).get(FAILED, "killed from outside (memory?)")
        self._round.append(probe)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the readings are in the store, and a new search is told them."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see :meth:`save`."""


class ProbeCallback(DriverCallback):
    """Tells the terminal and MLflow of every probe."""

    def __init__(self, ctx: Context, jobs: ProbeJobs) -> None:
        self._ctx, self._jobs = ctx, jobs

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if FAILED not in trial.last_result:
            tell_probe(self._ctx, self._jobs(Probe(**trial.config)), trial.last_result, "upper_bound")


def run_probe(config: Mapping[str, Any], jobs: ProbeJobs, embeddings: Embeddings, cpus: float, board: Board) -> None:
    """The Tune function of a probe: fit (or find) one clustering and report its r_C, or why there is none.

    An exception would be taken for the death of its process or node, after which Tune starts it again.
    """
    try:
        facts = clusterings.fit(jobs(Probe(**config)), embeddings, cpus, board)
    except Exception as error:
        if find_fault(error) is not None:
            raise  # the driver ends the search for it
        ray.tune.report({"reading": math.nan, FAILED: Failure.of(error).text})
        return
    ray.tune.report({"reading": jobs.reading(facts), **{name: facts[name] for name in TOLD}})


def run_probes(ctx: Context, search: BoundSearch, jobs: ProbeJobs, embeddings: Embeddings, folder: Path) -> None:
    """Run probes until the search is done.

    Raises:
        RuntimeError: If clustering failed too often.
    """
    cpus, gpus, at_once = ctx.shares.cpus_per_probe, ctx.shares.gpus_per_probe, probes_at_once(ctx)
    searcher = ProbeSearcher(search, at_once, ctx.stopping)
    probe = ray.tune.with_parameters(run_probe, jobs=jobs, embeddings=embeddings, cpus=cpus, board=ctx.board)
    ray.tune.Tuner(
        ray.tune.with_resources(probe, {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}),
        tune_config=ray.tune.TuneConfig(search_alg=searcher, num_samples=-1),
        run_config=run_settings("upper_bound", folder, [StorageWatch(ctx.store.root.parent, ProbeCallback(ctx, jobs))]),
    ).fit()
    if not search.done:
        ctx.stopping.check()
        raise RuntimeError(f"clustering failed {searcher.failures} times, {searcher.reason}; see {folder} for more")


def probes_at_once(ctx: Context) -> int:
    """Probes in a round: what the cluster can run side by side, or what the settings allow."""
    allowed = ctx.config.bound.max_concurrent or ctx.shares.max_probes
    return min(allowed, ctx.shares.max_probes)


def tell_probe(ctx: Context, job: ClusteringJob, facts: Mapping[str, Any], stage: str) -> None:
    """One line on the terminal and one child run in MLflow for a clustering that is done."""
    clusters, ratio = job.num_clusters, float(facts["utilization_ratio"])
    mean = float(facts["quality"]["mean_utilization_ratio"])
    said = f"  C={clusters}: {facts['num_used']} clusters used, r_C {ratio:.4f}, mean of the heads {mean:.4f}"
    heard = ProbeFacts(stage, clusters, int(facts["num_used"]), ratio, mean, job.seed)
    ctx.terminal.line(f"{said} ({job.terms})", facts=heard)
    tracker, settings = ctx.tracker, job.settings
    run = tracker.child(
        f"probe/{job.path.name}",
        f"{'probe' if stage == 'upper_bound' else 'lower bound'} C={clusters} ({job.terms})",
        {"C": clusters, "seed": job.seed, "heads": settings.num_heads, "gamma": settings.gamma},
        {"stage": stage, "C": clusters, "grouping": job.grouping},
    )
    tracker.metrics(run, {**facts["quality"], "num_clusters": clusters, "seconds": facts["seconds"]}, kimg=0)
    tracker.describe(run, probe_page(tracker.parent_key, run, said, mosaic=job.file.with_name(MOSAIC_FILE).is_file()))
    track_clustering(tracker, run, job.file, facts)
    tracker.end(run, "complete")
