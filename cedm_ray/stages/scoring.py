"""Which detector scores a search, its weights and the statistics of the real images, from the store or made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from cedm_ray.data.pack import load_packed
from cedm_ray.errors import UserError
from cedm_ray.features.backbones import BackboneSpec
from cedm_ray.metrics.detectors import Detector, FunctionDetector, metric_name
from cedm_ray.metrics.frechet import FeatureSums
from cedm_ray.metrics.lenet import load_lenet, save_lenet, train_lenet
from cedm_ray.metrics.stats import FeatureStats, StatsFacts, load_stats, save_stats
from cedm_ray.stages.context import Context
from cedm_ray.stages.embed import Embeddings, backbone_spec
from cedm_ray.stages.store import Store

LENET_FILE = "lenet.safetensors"
STATS_FILE = "reference.safetensors"
BLOCK = 1024


@dataclass(frozen=True)
class Scoring:
    """A detector and the statistics of the real images in its features: all that a process needs to score."""

    facts: StatsFacts
    """What makes a score comparable: detector, weights, resize, dtype, dimensions; ``count`` is of the real images."""
    reference: Path
    lenet: Path | None
    backbone: BackboneSpec

    @property
    def metric(self) -> str:
        """Name of the score, for example ``fd_lenet``."""
        return metric_name(self.facts.detector)

    def load_detector(self, device: torch.device) -> Detector:
        """The detector, on a device."""
        if self.lenet is not None:
            return load_lenet(self.lenet, device=device)
        return _backbone_detector(self.backbone, self.facts.weights_hash, device)

    def load_reference(self) -> FeatureStats:
        """Mean and covariance of the real images' features."""
        return load_stats(self.reference)


def _backbone_detector(spec: BackboneSpec, weights_hash: str, device: torch.device) -> FunctionDetector:
    backbone = spec.load(device)
    return FunctionDetector(backbone.name, backbone.dim, backbone, resize=backbone.resize, weights_hash=weights_hash)


def prepare_scoring(ctx: Context, embeddings: Embeddings) -> Scoring:
    """The detector and the statistics of the real images, from the store or made now.

    With the backbone as the detector, the embeddings are the real images' features.
    """
    config, store = ctx.config, ctx.store
    backbone = backbone_spec(config, ctx.packed)
    base = {"images": ctx.packed.facts.pixels_sha256, "detector": config.score.detector}
    if config.score.detector == "lenet":
        inputs: dict[str, Any] = {**base, "seed": 0}
        path = store.path("detectors", inputs)
        if store.facts(path) is None:
            task = ray.remote(_make_lenet).options(num_cpus=ctx.shares.cpus_per_probe)
            ray.get(task.remote(ctx.images, path, inputs, store))
        return Scoring(load_stats(path / STATS_FILE).facts, path / STATS_FILE, path / LENET_FILE, backbone)
    inputs = {**base, "backbone": config.backbone, "weights": ctx.weights_hash}
    path = store.path("references", inputs)
    if store.facts(path) is None:
        detector = _backbone_detector(backbone, ctx.weights_hash, torch.device("cpu"))
        _keep_stats(path, inputs, store, _sums(embeddings.values), detector)
    return Scoring(load_stats(path / STATS_FILE).facts, path / STATS_FILE, None, backbone)


def _sums(features: np.ndarray) -> FeatureSums:
    sums = FeatureSums(features.shape[1])
    for start in range(0, len(features), BLOCK):
        sums.update(torch.from_numpy(features[start : start + BLOCK].copy()))
    return sums


def _keep_stats(path: Path, inputs: dict[str, Any], store: Store, sums: FeatureSums, detector: Detector) -> None:
    stats = _stats(sums, detector)
    with store.create(path, inputs, asdict(stats.facts)) as scratch:
        save_stats(stats, scratch / STATS_FILE)


def _stats(sums: FeatureSums, detector: Detector) -> FeatureStats:
    count, dim = int(sums.count), detector.dim
    facts = StatsFacts(detector.name, detector.weights_hash, detector.resize, "float32", dim, count)
    return FeatureStats(*sums.mean_cov(), facts)


def _make_lenet(images: Path, path: Path, inputs: dict[str, Any], store: Store) -> None:
    """Train the classifier on the labelled images, and keep it with the statistics of its features."""
    torch.set_num_threads(1)  # one number of threads everywhere: the same weights from the same machine
    packed = load_packed(images)
    labels = packed.labels()
    if labels is None or packed.num_classes is None:
        raise UserError("score.detector is lenet, which is trained on labels, and these images have none")
    pixels = torch.from_numpy(np.array(packed.images))
    lenet = train_lenet(pixels, torch.from_numpy(labels), packed.num_classes, seed=0)
    sums = FeatureSums(lenet.dim)
    for start in range(0, len(pixels), BLOCK):
        sums.update(lenet(pixels[start : start + BLOCK]))
    stats = _stats(sums, lenet)
    with store.create(path, inputs, asdict(stats.facts)) as scratch:
        save_lenet(lenet, scratch / LENET_FILE)
        save_stats(stats, scratch / STATS_FILE)
