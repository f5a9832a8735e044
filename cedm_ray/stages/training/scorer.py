"""Scoring of a training: images from its averaged weights, their features, and the distances to the real ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cedm_ray.diffusion.compute import Compute
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.sample_batch import fitting_batch
from cedm_ray.diffusion.sampler import generate
from cedm_ray.metrics.detectors import features_and_logits
from cedm_ray.metrics.frechet import FeatureSums
from cedm_ray.metrics.stats import FeatureStats
from cedm_ray.stages.cluster.board import Beat, Board
from cedm_ray.stages.show.progress import scoring_label
from cedm_ray.stages.storage.bucket_files import keep_file
from cedm_ray.stages.training.trial_job import TrialJob
from cedm_ray.weights.whole_file import whole_file

NUM_SAMPLES = 64
DETECTOR_BATCH = 256  # images: detectors need more memory for each than the sampler does


class Scorer:
    """One process's share of the generated images.

    Args:
        job: The training.
        net: The network to sample from, on the device.
        cluster_probs: Shares with which clusters are drawn; None without a condition.
        rank: Which process this is.
        world_size: How many there are.
        device: On which this one computes.
        compute: How it computes.
        board: Where the progress of scoring is told, if anybody wants to know.
    """

    def __init__(
        self,
        job: TrialJob,
        net: EDMPrecond,
        cluster_probs: Tensor | None,
        rank: int,
        world_size: int,
        device: torch.device,
        compute: Compute,
        *,
        board: Board | None = None,
    ) -> None:
        self.job, self.net, self.cluster_probs = job, net, cluster_probs
        self.rank, self.world_size, self.device, self.compute = rank, world_size, device, compute
        self.batch_size, self._board = job.score.batch_size, board
        self.detectors = {ref.metric: ref.detector.load(device) for ref in job.scoring.references}
        self.stats: dict[str, FeatureStats] = {}
        """Of the last generated images; in the first process."""
        self.samples: Tensor | None = None
        """The first images of the first set."""

    def sets(self, num_sets: int, num_images: int, *, keep_features: bool = False) -> dict[str, list[float]]:
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
        for images in self._with_progress(self._generated(number * num_images, num_images), num_images):
            for (metric, detector), part in product(self.detectors.items(), torch.split(images, DETECTOR_BATCH)):
                found, logits = features_and_logits(detector, part) if keep_features else (detector(part), None)
                sums[metric].update(found)
                if keep_features:
                    features[metric].append(found.cpu())
                if logits is not None:
                    features[f"{metric}-logits"].append(logits.cpu())
            if number == 0 and sum(map(len, kept)) < NUM_SAMPLES:
                kept.append(images)
        if kept:
            self.samples = torch.cat(kept)[:NUM_SAMPLES].cpu()
        if keep_features:
            self._write_features(features)
        return {metric: self._distance(metric, each) for metric, each in sums.items()}

    def _generated(self, first: int, num_images: int) -> Iterator[Tensor]:
        """This process' share of the images from ``first`` on, in batches, which shrink where memory is too small."""
        # A contiguous block each; rank 0 has the first ones, which are also the samples that people look at.
        bounds = np.linspace(first, first + num_images, self.world_size + 1).astype(int)
        done, end = int(bounds[self.rank]), int(bounds[self.rank + 1])
        while done < end:
            try:
                for images in self._batches(range(done, end)):
                    yield images
                    done += len(images)
            except torch.OutOfMemoryError:
                # The images do not depend on the batch, and the other processes do not wait for this one here.
                batch = self.batch_size or fitting_batch(self.net, self.device)
                if batch == 1:
                    raise
                self.batch_size = batch // 2
                torch.cuda.empty_cache()

    def _batches(self, indices: range) -> Iterator[Tensor]:
        return generate(
            self.net,
            seed=self.job.seed,
            indices=indices,
            cluster_probs=self.cluster_probs,
            batch_size=self.batch_size,
            num_steps=self.job.score.num_steps,
            device=self.device,
            precision=self.compute.sample_precision,
            compile=self.compute.compile,
        )

    def _with_progress(self, batches: Iterator[Tensor], num_images: int) -> Iterator[Tensor]:
        """The same batches; the first process tells how far scoring is, in place of how far training is."""
        if self._board is None or self.rank:
            yield from batches
            return
        self._board.remove(self.job.key)
        beat = Beat(self._board, self.job.score_key, scoring_label(self.job.label), num_images, "images")
        done = 0
        try:
            for images in batches:
                yield images
                done += len(images) * self.world_size
                beat(min(done, num_images))
        finally:
            beat.close()
            self._board.open(self.job.key)

    def _write_features(self, features: Mapping[str, list[Tensor]]) -> None:
        folder = self.job.features
        folder.mkdir(parents=True, exist_ok=True)
        for name, blocks in features.items():
            file = folder / f"{name}-{self.rank}.npy"
            with whole_file(file) as partial:
                np.save(partial, torch.cat(blocks).numpy(), allow_pickle=False)
            keep_file(file)

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
