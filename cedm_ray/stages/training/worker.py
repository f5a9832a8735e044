"""One process of a training: it trains, scores and saves."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from cedm_ray.clustering.clustering_io import load_clustering
from cedm_ray.data.pack import IMAGES, PackedImages
from cedm_ray.diffusion.compute import decide
from cedm_ray.diffusion.device_memory import fits
from cedm_ray.diffusion.image_source import ImageSource, ResidentImages
from cedm_ray.diffusion.passes import part_size
from cedm_ray.diffusion.settings import build_net, local_batch
from cedm_ray.diffusion.state_io import load_state, save_state
from cedm_ray.diffusion.train import Progress, train
from cedm_ray.diffusion.train_state import new_state
from cedm_ray.metrics.stats import save_stats
from cedm_ray.report.grids import sample_grid
from cedm_ray.stages.cluster.board import Beat, Board
from cedm_ray.stages.inputs.images import images_here
from cedm_ray.stages.storage.bucket_entries import here
from cedm_ray.stages.storage.bucket_files import fetch_files, follow, keep_file, look_for
from cedm_ray.stages.storage.checkpoints import (
    MANIFEST_FILE,
    RUNGS_FILE,
    SAMPLE_PIXELS_FILE,
    SAMPLES_FILE,
    STATE_FILE,
    checkpoints,
    newest_whole,
    prune,
    write_manifest,
)
from cedm_ray.stages.storage.store import read_json, write_json
from cedm_ray.stages.training.energy import Meter
from cedm_ray.stages.training.process_group import broadcast_text
from cedm_ray.stages.training.scorer import Scorer
from cedm_ray.stages.training.streamed import StreamedImages
from cedm_ray.stages.training.trial_job import TrialJob

DEVICE_BATCH_FILE = "device_batch.json"
"""Beside the checkpoints of a training that has once run out of memory: what a process computes at once since."""

Rung = dict[str, Any]


def samples_stats_file(metric: str) -> str:
    """Name of the file, beside an unconditional model's checkpoint, with the statistics of its samples' features."""
    return f"{metric}-samples.safetensors"


class Worker:
    """One process of a training: its share of the batch and of the generated images.

    Args:
        job: The training.
        rank: Which process this is.
        world_size: How many there are.
        device: On which this one computes.
        gpus: GPUs that each of them asked for, where it computes on one.
        sharing: Processes, of all trainings, that share the memory of the device.
        board: Where scoring and torn checkpoints are told, if anybody wants to know.
    """

    def __init__(
        self,
        job: TrialJob,
        rank: int,
        world_size: int,
        device: torch.device,
        *,
        gpus: float = 1.0,
        sharing: float = 1.0,
        board: Board | None = None,
    ) -> None:
        self.job, self.rank, self.world_size, self._device = job, rank, world_size, device
        self._board = board
        halved = read_json(look_for(job.path / DEVICE_BATCH_FILE)) or {}
        self.compute = replace(decide(job.compute, device), **halved)
        packed = images_here(job.images)
        class_index: Tensor | None = None
        cluster_probs: Tensor | None = None
        if job.condition is not None:
            clustering = load_clustering(here(job.condition), num_images=len(packed))
            class_index = torch.from_numpy(clustering.assignments)
            probs = torch.from_numpy(clustering.cluster_probs)
            # An empty cluster was never trained on: uniform means over the used ones.
            cluster_probs = (probs > 0).double() if job.score.conditions == "uniform" else probs
        self.source = image_source(job, packed, class_index, device, sharing)
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
        self.scorer = Scorer(job, self.state.ema, cluster_probs, rank, world_size, device, self.compute, board=board)
        self.rungs: list[Rung] = []
        self._local = local_batch(job.diffusion.total_batch, world_size)
        self.meter = Meter(device, world_size, gpus)
        self._steps: Generator[Progress, None, None] | None = None

    def restore(self) -> list[Rung]:
        """Go on from the newest checkpoint that is whole, if there is one.

        Returns:
            The rungs that are already done, with the paths of their checkpoints: nobody may have heard of the last.
        """
        folder = self._newest()
        if folder is None:
            return []
        load_state(self.state, folder / STATE_FILE)
        self.rungs = json.loads((folder / RUNGS_FILE).read_text())
        paths = {each.nimg: {"checkpoint_path": str(each.folder)} for each in checkpoints(self.job.checkpoints)}
        return [{**rung, **paths.get(rung["nimg"], {})} for rung in self.rungs]

    def _newest(self) -> Path | None:
        """The checkpoint to go on from; rank 0 looks, and all go on from the same one."""
        chosen = ""
        if self.rank == 0:
            fetch_files(self.job.checkpoints)
            found, set_aside = newest_whole(self.job.checkpoints)
            chosen = "" if found is None else str(found.folder)
            for line in set_aside:
                if self._board is not None:
                    self._board.say(f"{self.job.label}: {line}")
        if dist.is_initialized():
            chosen = broadcast_text(chosen, self._device)
        if not chosen:
            return None
        fetch_files(Path(chosen))
        return Path(chosen)

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
        loss = self._train(kimg * 1000, beat)
        trained_s = time.monotonic() - started_s
        rung: Rung = {
            "kimg": kimg,
            "nimg": self.state.nimg,
            "loss": loss,
            "images_per_s": (self.state.nimg - started_nimg) / trained_s,
            "precision": self.compute.precision,
            "sample_precision": self.compute.sample_precision,
            "device_batch": part_size(self._local, self.compute.device_batch),
            **self._scores(last=kimg == self.job.search_kimg, lost=math.isnan(loss)),
        }
        rung |= {"score_s": time.monotonic() - started_s - trained_s, **self.meter.read()}
        self.rungs.append(rung)
        return rung

    def _train(self, stop_nimg: int, beat: Beat) -> float:
        """Train until so many images have been seen; returns the loss, when the device has done all of it."""
        losses: list[Tensor] = []
        for progress in self._steps_to(stop_nimg):
            losses.append(progress.loss)
            if self.rank == 0:
                beat(progress.nimg / 1000)
        return self._loss(torch.stack(losses))

    def _scores(self, *, last: bool, lost: bool) -> Rung:
        """The scores of a rung, at the ``last`` one of the search from several sets of images; NaN of a lost training.

        Images of such weights would cost as much as others and say nothing.
        """
        score, metric = self.job.score, self.job.scoring.metric
        num_sets = score.num_sets if last else 1
        if lost:
            sets = {name: [math.nan] * num_sets for name in self.scorer.detectors}
        else:
            sets = self.scorer.sets(num_sets, score.num_images)
        means = {name: statistics.fmean(values) for name, values in sets.items()}
        found = {"score": means[metric], **means, "num_images": score.num_images}
        return {**found, "score_sets": sets[metric]} if last else found

    def _steps_to(self, stop_nimg: int) -> Iterator[Progress]:
        """The steps up to so many images seen; from rung to rung the network stays wrapped and compiled."""
        if self._steps is None:
            self._steps = train(
                self.state,
                self.source,
                settings=self.job.diffusion,
                stop_nimg=self.job.rungs_kimg[-1] * 1000,
                seed=self.job.seed,
                compute=self.compute,
                rank=self.rank,
                world_size=self.world_size,
            )
        while self.state.nimg < stop_nimg:
            try:
                yield next(self._steps)
            except torch.OutOfMemoryError:
                self._halve_device_batch()
                raise

    def _loss(self, losses: Tensor) -> float:
        """Mean over the steps whose loss is a number; NaN where that of the last step is none in any process.

        A single step may overflow, and its gradients are cleaned; a training whose last step gave no number is lost.
        """
        finite = losses.isfinite()
        lost = 1 - finite[-1].to(torch.float32)
        if dist.is_initialized():  # all processes decide alike: they score together or not at all
            dist.all_reduce(lost, dist.ReduceOp.MAX)
        return math.nan if lost else float(losses[finite].mean())

    def _halve_device_batch(self) -> None:
        """Note that the processes, when they are started again, compute half as many images at once; this once.

        The process cannot go on by itself: the others wait for its gradients.
        """
        file, now = self.job.path / DEVICE_BATCH_FILE, part_size(self._local, self.compute.device_batch)
        if now > 1 and read_json(file) is None:
            write_json(file, {"device_batch": now // 2})
            keep_file(file)

    def close(self) -> None:
        """Free what the training holds beside its state: images that are read ahead."""
        if self._steps is not None:
            self._steps.close()

    def finish(self) -> Rung:
        """Score the final sets of images and add them to the last rung; the features of the first set are kept."""
        num_images = self.job.final_images
        scores = self.scorer.sets(self.job.final_sets, num_images, keep_features=True)
        self.rungs[-1] = {**self.rungs[-1], "final_scores": scores, "final_images": num_images}
        return self.rungs[-1]

    def checkpoint(self, folder: Path) -> ray.train.Checkpoint:
        """Everything that is needed to go on, the samples, and a list of it, in a folder that Ray Train copies."""
        save_state(self.state, folder / STATE_FILE)
        (folder / RUNGS_FILE).write_text(json.dumps(self.rungs))
        if self.scorer.samples is not None:
            sample_grid(self.scorer.samples.numpy(), columns=8).save(folder / SAMPLES_FILE)
            np.save(folder / SAMPLE_PIXELS_FILE, self.scorer.samples.numpy(), allow_pickle=False)
        if self.job.grouping == "none":  # what other models' samples are compared with
            for metric, stats in self.scorer.stats.items():
                save_stats(stats, folder / samples_stats_file(metric))
        write_manifest(folder, self.state.nimg)
        return ray.train.Checkpoint.from_directory(str(folder))

    def prune(self) -> None:
        """Thin the old checkpoints, when a new one is in its place; rank 0 alone calls this."""
        prune(self.job.checkpoints)
        follow(self.job.checkpoints, MANIFEST_FILE)


def image_source(
    job: TrialJob, packed: PackedImages, class_index: Tensor | None, device: torch.device, sharing: float
) -> ImageSource:
    """The images on the device where they fit, else streamed by Ray Data: the same batches either way."""
    resident = job.compute.images == "resident"
    if job.compute.images == "auto":
        resident = fits(packed.images.nbytes, device, sharing)
    if not resident:
        return StreamedImages(job.images / IMAGES, class_index, device)
    on_device = None if class_index is None else class_index.to(device)
    return ResidentImages(torch.from_numpy(np.array(packed.images)).to(device), on_device)
