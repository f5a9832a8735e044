"""One trial: a Tune function that makes the clustering and trains C-EDM on it as a Ray Train job."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from cedm_ray.stages.cluster.board import Beat, Board
from cedm_ray.stages.cluster.shares import Shares
from cedm_ray.stages.inputs import clusterings
from cedm_ray.stages.inputs.embed import Embeddings
from cedm_ray.stages.storage.bucket_files import look_for
from cedm_ray.stages.storage.checkpoints import STATE_COPIES, forget_snapshot, keep_in_bucket
from cedm_ray.stages.storage.disk_faults import find_fault
from cedm_ray.stages.storage.storage_errors import SPARE_BYTES, Disk, Need, written_to
from cedm_ray.stages.training.interruptions import FAILED, Failure, Interruptions
from cedm_ray.stages.training.process_group import NodeAddressConfig
from cedm_ray.stages.training.records import read_record
from cedm_ray.stages.training.trial_job import Planner, TrialJob
from cedm_ray.stages.training.worker import DEVICE_BATCH_FILE, Rung, Worker

PAUSE_S, NODE_S = 5.0, 30.0
"""Between an interruption and the next start, and where a node may have been lost with a process."""


def run_trial(
    config: Mapping[str, Any],
    planner: Planner,
    embeddings: Embeddings,
    board: Board,
    shares: Shares,
    total_kimg: int | None = None,
) -> None:
    """The Tune function: make the clustering if need be, then train; every rung is reported to Tune.

    Args:
        config: The parameters of the trial, from the searcher.
        planner: Turns them into a job.
        embeddings: The embeddings and their neighbours.
        board: Where progress is told.
        shares: What to ask for of the cluster.
        total_kimg: Train to the final budget (None: to the one of the search).
    """
    # The workers import this module too, and have no use for Tune.
    from ray.tune import report
    from ray.tune.integration.ray_train import TuneReportCallback

    job = planner.job(config, total_kimg=total_kimg)

    def train() -> None:
        if job.clustering is not None and planner.store.facts(job.clustering.path) is None:
            # Outside the trial's own share, which is a place on the head and no CPU.
            task = ray.remote(clusterings.fit).options(
                num_cpus=shares.cpus_per_probe,
                num_gpus=shares.gpus_per_probe,
                scheduling_strategy="DEFAULT",
                max_retries=0,  # whether it is tried again is decided for the trial as a whole
            )
            ray.get(task.remote(job.clustering, embeddings, shares.cpus_per_probe, board))
        forget_snapshot(job.checkpoints)
        _trainer(job, board, shares, TuneReportCallback()).fit()

    reason = _keep_on(job, board, train)
    if reason is not None:
        # An exception would be taken for the death of this process, after which Tune starts the trial again.
        report({FAILED: reason})


def _keep_on(job: TrialJob, board: Board, train: Callable[[], None]) -> str | None:
    """Train in spite of interruptions; each time it goes on from the newest checkpoint.

    Returns:
        Why it has ended before its time, or None.

    Raises:
        Exception: What a disk was behind: the driver ends the search for it.
    """
    interruptions = Interruptions(_reached_kimg(job))
    while True:
        nodes, halved = _nodes(), look_for(job.path / DEVICE_BATCH_FILE).is_file()
        try:
            train()
        except Exception as error:
            if find_fault(error) is not None:
                raise
            failure = Failure.of(error)
        else:
            return None
        # The death of a process is known at once, that of its node, where it was that, some 15 seconds later.
        node_lost = _lost(nodes, NODE_S if failure.kind == "killed" and len(nodes) > 1 else PAUSE_S)
        reached = _reached_kimg(job)
        reason = interruptions.ends(failure, reached, node_lost=node_lost, halved=halved)
        if reason is not None:
            return reason
        if failure.kind != "waiting":
            killed = "a node was lost" if node_lost else "a process was killed"
            what = failure.text if failure.kind == "own" else killed
            board.say(f"{job.label}: {what}; goes on from {reached:,} kimg")


def _reached_kimg(job: TrialJob) -> int:
    """The newest rung that the driver has heard of."""
    record = read_record(job.path)
    return int(record.rungs[-1]["kimg"]) if record is not None and record.rungs else 0


def _lost(nodes: set[str], within_s: float) -> bool:
    """Whether one of these nodes is gone, or goes within so many seconds; takes ``PAUSE_S`` at least."""
    time.sleep(PAUSE_S)
    for _ in range(round(within_s - PAUSE_S)):
        if nodes - _nodes():
            break
        time.sleep(1)
    return bool(nodes - _nodes())


def _nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _trainer(
    job: TrialJob, board: Board, shares: Shares, report: ray.train.UserCallback
) -> ray.train.torch.TorchTrainer:
    """The training as a job of Ray Train, which ends at the first failure: what follows is decided here."""
    return ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={
            "job": job,
            "board": board,
            "threads": max(1, round(shares.cpus_per_worker)),
            "gpus": shares.gpus_per_worker,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=shares.num_workers,
            use_gpu=shares.gpus_per_worker > 0,
            resources_per_worker=shares.worker,
        ),
        torch_config=NodeAddressConfig(),
        run_config=ray.train.RunConfig(
            name=job.checkpoints.name,
            storage_path=str(job.path),
            callbacks=[report],
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )


def train_worker(loop: Mapping[str, Any]) -> None:
    """What each process of a training runs: train to a rung, score, checkpoint, report, and on to the next."""
    job: TrialJob = loop["job"]
    torch.set_num_threads(loop["threads"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    beat = Beat(loop["board"], job.key, job.label, job.rungs_kimg[-1], "kimg")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
    sharing = 1 / loop["gpus"] if loop["gpus"] else (os.cpu_count() or 1) / loop["threads"]
    worker = Worker(job, rank, world_size, device, gpus=loop["gpus"], sharing=max(1.0, sharing), board=loop["board"])
    try:
        for rung in worker.restore():
            ray.train.report(rung)  # Tune may not have heard of it before the interruption
        for kimg in worker.missing_rungs():
            if rank == 0:
                _storage(job).check(_checkpoint_need(worker))  # now, not after hours of training
            _report(worker, worker.train_to(kimg, beat))
        if job.final_sets and not job.finally_scored(worker.rungs[-1]):
            _report(worker, worker.finish())
    finally:
        worker.close()
        if rank == 0:
            beat.close()


def _report(worker: Worker, rung: Rung) -> None:
    """Report a rung, and from rank 0 its checkpoint."""
    if worker.rank != 0:
        ray.train.report(rung)
        return
    need = _checkpoint_need(worker)
    with tempfile.TemporaryDirectory() as folder:
        with written_to(Disk.temporary(Path(tempfile.gettempdir())), need):
            checkpoint = worker.checkpoint(Path(folder))
        with written_to(_storage(worker.job), need):
            kept = keep_in_bucket(Path(folder), worker.job.checkpoints)
            if kept is None:
                ray.train.report(rung, checkpoint=checkpoint)
            else:
                ray.train.report({**rung, "checkpoint_path": str(kept)})
            worker.prune()


def _storage(job: TrialJob) -> Disk:
    return Disk.storage(job.path.parents[2])


def _checkpoint_need(worker: Worker) -> Need:
    """What a checkpoint takes: the network, its moving average, Adam's moments, and a little for what lies beside."""
    state = STATE_COPIES * sum(p.numel() * p.element_size() for p in worker.state.net.parameters())
    return Need(f"a checkpoint of {worker.job.label}", state + SPARE_BYTES)
