"""One trial: a Tune function that makes the clustering and trains C-EDM on it as a Ray Train job."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from cedm_ray.clustering.clustering_io import load_clustering
from cedm_ray.data.pack import load_packed
from cedm_ray.diffusion.sampler import generate
from cedm_ray.diffusion.settings import build_net
from cedm_ray.diffusion.state_io import load_state, save_state
from cedm_ray.diffusion.train import new_state, train
from cedm_ray.metrics.detectors import features_and_logits
from cedm_ray.metrics.frechet import FeatureSums
from cedm_ray.metrics.stats import FeatureStats, save_stats
from cedm_ray.report.grids import sample_grid
from cedm_ray.stages import groupings
from cedm_ray.stages.board import Beat, Board
from cedm_ray.stages.cluster import Shares
from cedm_ray.stages.embed import Embeddings
from cedm_ray.stages.energy import Meter
from cedm_ray.stages.plan import Planner, TrialJob

STATE_FILE = "state.safetensors"
RUNGS_FILE = "rungs.json"
SAMPLES_FILE = "samples.png"
SAMPLE_PIXELS_FILE = "samples.npy"
NUM_SAMPLES = 64

Rung = dict[str, Any]


def samples_stats_file(metric: str) -> str:
    """Name of the file, beside an unconditional model's checkpoint, with the statistics of its samples' features."""
    return f"{metric}-samples.safetensors"


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
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=3 if job.final_sets else 2),
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
    worker = Worker(job, rank, world_size, device, gpus=loop["gpus"])
    worker.board = loop["board"]
    try:
        for rung in worker.restore():
            ray.train.report(rung)  # Tune may not have heard of it before the interruption
        for kimg in worker.missing_rungs():
            _report(worker, worker.train_to(kimg, beat))
        if job.final_sets and not job.finally_scored(worker.rungs[-1]):
            _report(worker, worker.finish())
    finally:
        if rank == 0:
            beat.close()


def _report(worker: Worker, rung: Rung) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = worker.checkpoint(Path(folder)) if worker.rank == 0 else None
        ray.train.report(rung, checkpoint=checkpoint)


class Worker:
    """One process of a training: its share of the batch and of the generated images.

    Args:
        job: The training.
        rank: Which process this is.
        world_size: How many there are.
        device: On which this one computes.
        gpus: GPUs that each of them asked for, where it computes on one.
    """

    def __init__(self, job: TrialJob, rank: int, world_size: int, device: torch.device, *, gpus: float = 1.0) -> None:
        self.job, self.rank, self.world_size, self.device = job, rank, world_size, device
        packed = load_packed(job.images)
        self.images = torch.from_numpy(np.array(packed.images)).to(device)
        self.class_index: Tensor | None = None
        self.cluster_probs: Tensor | None = None
        if job.condition is not None:
            clustering = load_clustering(job.condition, num_images=len(packed))
            self.class_index = torch.from_numpy(clustering.assignments).to(device)
            probs = torch.from_numpy(clustering.cluster_probs)
            # An empty cluster was never trained on: uniform means over the used ones.
            self.cluster_probs = (probs > 0).double() if job.score.conditions == "uniform" else probs
        self.detectors = {ref.metric: ref.detector.load(device) for ref in job.scoring.references}
        # Every process builds the same network; the caller's generators are left alone.
        with torch.random.fork_rng([]):
            torch.manual_seed(job.seed)
            net = build_net(
                job.diffusion,
                packed.resolution,
                packed.channels,
                label_dim=job.num_clusters if job.condition is not None else 0,
                augment=job.diffusion.augment_prob > 0,
                sigma_data=job.diffusion.sigma_data,
            )
        self.state = new_state(net.to(device))
        self.rungs: list[Rung] = []
        self.stats: dict[str, FeatureStats] = {}  # of the last generated images
        self.samples: Tensor | None = None
        self.board: Board | None = None
        """Where the progress of scoring is told, if anybody wants to know."""
        self.meter = Meter(device, world_size, gpus)

    def restore(self) -> list[Rung]:
        """Go on from the newest checkpoint, if there is one; returns the rungs that are already done."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                load_state(self.state, Path(folder) / STATE_FILE)
                self.rungs = json.loads((Path(folder) / RUNGS_FILE).read_text())
        return list(self.rungs)

    def missing_rungs(self) -> Iterator[int]:
        """The rungs that are still to be trained to, in kimg."""
        return (kimg for kimg in self.job.rungs_kimg if kimg * 1000 > self.state.nimg)

    def train_to(self, kimg: int, beat: Beat) -> Rung:
        """Train until so many kimg have been seen, score, and return the rung.

        It is the same in every process but for the scores, which only rank 0 works out. At the end of the search they
        are means over several sets of images, and ``score_sets`` holds each set's value of the score that decides;
        what the rung cost counts from the one before it.
        """
        self.meter.start()
        started_s, started_nimg = time.monotonic(), self.state.nimg
        losses: list[Tensor] = []
        for progress in train(
            self.state,
            self.images,
            self.class_index,
            settings=self.job.diffusion,
            stop_nimg=kimg * 1000,
            seed=self.job.seed,
            rank=self.rank,
            world_size=self.world_size,
        ):
            losses.append(progress.loss)
            if self.rank == 0:
                beat(progress.nimg / 1000)
        trained_s = time.monotonic() - started_s
        rung: Rung = {
            "kimg": kimg,
            "nimg": self.state.nimg,
            "loss": float(torch.stack(losses).mean()),
            "images_per_s": (self.state.nimg - started_nimg) / trained_s,
        }
        last = kimg == self.job.search_kimg
        sets = self._score_sets(self.job.score.num_sets if last else 1, self.job.score.num_images)
        scores = {metric: statistics.fmean(values) for metric, values in sets.items()}
        rung |= {"score": scores[self.job.scoring.metric], **scores, "num_images": self.job.score.num_images}
        if last:
            rung["score_sets"] = sets[self.job.scoring.metric]
        rung |= {"score_s": time.monotonic() - started_s - trained_s, **self.meter.read()}
        self.rungs.append(rung)
        return rung

    def finish(self) -> Rung:
        """Score the final sets of images and add them to the last rung; the features of the first set are kept."""
        num_images = self.job.final_images
        scores = self._score_sets(self.job.final_sets, num_images, keep_features=True)
        self.rungs[-1] = {**self.rungs[-1], "final_scores": scores, "final_images": num_images}
        return self.rungs[-1]

    def _score_sets(self, num_sets: int, num_images: int, *, keep_features: bool = False) -> dict[str, list[float]]:
        """The scores of each of several sets of images, by metric; the features of the first one are kept if asked."""
        keep = [keep_features] + [False] * (num_sets - 1)
        sets = [self.score(number, num_images, keep_features=kept) for number, kept in enumerate(keep)]
        return {metric: [each[metric] for each in sets] for metric in self.detectors}

    def score(self, number: int, num_images: int, *, keep_features: bool = False) -> dict[str, float]:
        """Fréchet distances of one set of generated images; only rank 0's values are of all processes' images.

        Args:
            number: Which set: images ``number * num_images`` and on, so that sets share none.
            num_images: Images in the set, over all processes.
            keep_features: Also write the features of this process' images into the trial's folder.
        """
        sums = {metric: FeatureSums(detector.dim, device=self.device) for metric, detector in self.detectors.items()}
        features: dict[str, list[Tensor]] = defaultdict(list)
        kept: list[Tensor] = []
        for images in self._told(self._generated(number * num_images, num_images), num_images):
            for metric, detector in self.detectors.items():
                found, logits = features_and_logits(detector, images) if keep_features else (detector(images), None)
                sums[metric].update(found)
                if keep_features:
                    features[metric].append(found.cpu())
                if logits is not None:
                    features[f"{metric}-logits"].append(logits.cpu())
            if number == 0 and len(kept) * self.job.score.batch_size < NUM_SAMPLES:
                kept.append(images)
        if kept:
            self.samples = torch.cat(kept)[:NUM_SAMPLES].cpu()
        if keep_features:
            self._write_features(features)
        return {metric: self._distance(metric, each) for metric, each in sums.items()}

    def _generated(self, first: int, num_images: int) -> Iterator[Tensor]:
        """This process' share of the images from ``first`` on, in batches."""
        # A contiguous block each; rank 0 has the first ones, which are also the samples that people look at.
        bounds = np.linspace(first, first + num_images, self.world_size + 1).astype(int)
        return generate(
            self.state.ema,
            seed=self.job.seed,
            indices=range(bounds[self.rank], bounds[self.rank + 1]),
            cluster_probs=self.cluster_probs,
            batch_size=self.job.score.batch_size,
            num_steps=self.job.score.num_steps,
            device=self.device,
        )

    def _told(self, batches: Iterator[Tensor], num_images: int) -> Iterator[Tensor]:
        """The same batches; the first process tells how far scoring is, in place of how far training is."""
        if self.board is None or self.rank:
            yield from batches
            return
        self.board.remove(self.job.key)
        beat = Beat(self.board, self.job.score_key, f"{self.job.label} scoring", num_images, "images")
        done = 0
        try:
            for images in batches:
                yield images
                done += len(images) * self.world_size
                beat(min(done, num_images))
        finally:
            beat.close()
            self.board.open(self.job.key)

    def _write_features(self, features: Mapping[str, list[Tensor]]) -> None:
        folder = self.job.features
        folder.mkdir(parents=True, exist_ok=True)
        for name, blocks in features.items():
            partial = folder / f".{name}-{self.rank}.partial.npy"
            np.save(partial, torch.cat(blocks).numpy(), allow_pickle=False)
            partial.replace(folder / f"{name}-{self.rank}.npy")

    def _distance(self, metric: str, sums: FeatureSums) -> float:
        """Distance to the real images of the sums over all processes, which alone travel."""
        if dist.is_initialized():
            for tensor in sums.tensors():
                dist.all_reduce(tensor)
        if self.rank:
            return float("nan")
        mean, cov = sums.mean_cov()
        (reference,) = (each for each in self.job.scoring.references if each.metric == metric)
        self.stats[metric] = FeatureStats(mean.cpu(), cov.cpu(), replace(reference.facts, count=int(sums.count)))
        return self.stats[metric].distance(reference.load())

    def checkpoint(self, folder: Path) -> ray.train.Checkpoint:
        """Everything that is needed to go on, and the samples, in a folder that Ray Train copies to its place."""
        save_state(self.state, folder / STATE_FILE)
        (folder / RUNGS_FILE).write_text(json.dumps(self.rungs))
        if self.samples is not None:
            sample_grid(self.samples.numpy(), columns=8).save(folder / SAMPLES_FILE)
            np.save(folder / SAMPLE_PIXELS_FILE, self.samples.numpy(), allow_pickle=False)
        if self.job.grouping == "none":  # what other models' samples are compared with
            for metric, stats in self.stats.items():
                save_stats(stats, folder / samples_stats_file(metric))
        return ray.train.Checkpoint.from_directory(str(folder))
