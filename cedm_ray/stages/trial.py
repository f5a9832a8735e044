"""One trial: a Tune function that makes the clustering and trains C-EDM on it as a Ray Train job."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from cedm_ray.stages import groupings
from cedm_ray.stages.board import Beat, Board
from cedm_ray.stages.checkup_disk import CHECKPOINTS_KEPT
from cedm_ray.stages.cluster import Shares
from cedm_ray.stages.embed import Embeddings
from cedm_ray.stages.plan import Planner, TrialJob
from cedm_ray.stages.worker import Rung, Worker


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
    from ray.tune.integration.ray_train import TuneReportCallback

    job = planner.job(config, total_kimg=total_kimg)
    if job.clustering is not None and planner.store.facts(job.clustering.path) is None:
        # Outside the trial's own share, which is a place on the head and no CPU.
        task = ray.remote(groupings.fit).options(
            num_cpus=shares.cpus_per_probe, num_gpus=shares.gpus_per_probe, scheduling_strategy="DEFAULT"
        )
        ray.get(task.remote(job.clustering, embeddings, shares.cpus_per_probe, board))
    trainer = ray.train.torch.TorchTrainer(
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
            resources_per_worker={
                "CPU": shares.cpus_per_worker,
                **({"GPU": shares.gpus_per_worker} if shares.gpus_per_worker else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=job.checkpoints.name,
            storage_path=str(job.path),
            callbacks=[TuneReportCallback()],
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT + bool(job.final_sets)),
            failure_config=ray.train.FailureConfig(max_failures=1),
        ),
    )
    trainer.fit()


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
    worker = Worker(job, rank, world_size, device, gpus=loop["gpus"], sharing=max(1.0, sharing))
    worker.scorer.board = loop["board"]
    try:
        for rung in worker.restore():
            ray.train.report(rung)  # Tune may not have heard of it before the interruption
        for kimg in worker.missing_rungs():
            _report(worker, worker.train_to(kimg, beat))
        if job.final_sets and not job.finally_scored(worker.rungs[-1]):
            _report(worker, worker.finish())
    finally:
        worker.close()
        if rank == 0:
            beat.close()


def _report(worker: Worker, rung: Rung) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = worker.checkpoint(Path(folder)) if worker.rank == 0 else None
        ray.train.report(rung, checkpoint=checkpoint)
