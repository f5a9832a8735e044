"""Which detectors score a search, their weights, and the statistics of the real images in their features."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from cedm_ray.devices import default_device
from cedm_ray.metrics.detectors import metric_name
from cedm_ray.metrics.evaluation import feature_stats
from cedm_ray.metrics.stats import FeatureStats, StatsFacts, load_stats, save_stats
from cedm_ray.settings import DetectorName
from cedm_ray.stages.cluster.board import Board
from cedm_ray.stages.context import Context
from cedm_ray.stages.inputs.detectors import DetectorSpec, detector_facts, lenet_spec
from cedm_ray.stages.inputs.embed import Embeddings, backbone_spec
from cedm_ray.stages.inputs.features import FeatureParts
from cedm_ray.stages.storage.bucket_entries import here
from cedm_ray.stages.storage.paths import absolute

STATS_FILE = "reference.safetensors"


@dataclass(frozen=True)
class Reference:
    """A detector and the statistics of the real images in its features."""

    detector: DetectorSpec
    facts: StatsFacts
    """What makes a score comparable: detector, weights, resize, dtype, dimensions; ``count`` is of the real images."""
    file: Path

    @property
    def metric(self) -> str:
        """Name of the score, for example ``fid``."""
        return metric_name(self.facts.detector)

    def load(self) -> FeatureStats:
        """Mean and covariance of the real images' features."""
        return load_stats(here(self.file))


@dataclass(frozen=True)
class Scoring:
    """All that a process needs to score; the first reference is the one that the search minimises."""

    references: tuple[Reference, ...]

    @property
    def metric(self) -> str:
        """Name of the score that the search minimises."""
        return self.references[0].metric

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all scores."""
        return tuple(reference.metric for reference in self.references)

    def terms(self) -> dict[str, Any]:
        """What each score depends on besides the images, by dotted names such as ``fid.weights_hash``."""
        return {f"{ref.metric}.{name}": value for ref in self.references for name, value in asdict(ref.facts).items()}

    @property
    def facts(self) -> StatsFacts:
        """Facts of the score that the search minimises."""
        return self.references[0].facts


def prepare_scoring(ctx: Context, embeddings: Embeddings) -> Scoring:
    """The detectors and the statistics of the real images, from the store or made now."""
    return Scoring(tuple(_reference(ctx, name, embeddings) for name in ctx.config.score.detectors))


def _reference(ctx: Context, name: DetectorName, embeddings: Embeddings) -> Reference:
    spec = detector_spec(ctx, name)
    inputs = {"images": ctx.packed.facts.pixels_sha256, "detector": name, "weights": spec.weights_hash}
    if spec.backbone is not None:
        inputs |= {"backbone": spec.backbone.name, "dtype": embeddings.inputs["dtype"]}
    path = ctx.store.path("references", inputs)
    if ctx.store.facts(path) is None:
        if spec.backbone is not None:  # the embeddings are the real images' features
            facts = detector_facts(spec.load(torch.device("cpu")), str(embeddings.inputs["dtype"]))
            stats = feature_stats(embeddings.values, StatsFacts(**facts, count=len(embeddings.values)))
        else:
            parts = FeatureParts(ctx.images, spec, ctx.store)
            _make_features(ctx, parts)
            stats = parts.stats()
        with ctx.store.create(path, inputs, asdict(stats.facts)) as scratch:
            save_stats(stats, scratch / STATS_FILE)
    return Reference(spec, load_stats(path / STATS_FILE).facts, path / STATS_FILE)


def detector_spec(ctx: Context, name: DetectorName) -> DetectorSpec:
    """A detector of the search; lenet is trained now if it is not in the store."""
    if name in ctx.detector_hashes:
        weights = ctx.config.detector_weights if name == "inception" else ctx.config.dinov2_weights
        return DetectorSpec(name, absolute(weights), ctx.detector_hashes[name])
    if name == "backbone":
        return DetectorSpec(name, None, ctx.weights_hash, backbone_spec(ctx.config, ctx.packed))
    task = ray.remote(lenet_spec).options(num_cpus=ctx.shares.cpus_per_probe)
    spec: DetectorSpec = ray.get(task.remote(ctx.images, ctx.store))
    return spec


def _make_features(ctx: Context, parts: FeatureParts) -> None:
    """Make the missing parts of the real images' features, over the cluster."""
    shares, missing = ctx.shares, parts.missing()
    task = ray.remote(_make_part).options(num_cpus=shares.cpus_per_probe, num_gpus=shares.gpus_per_probe)
    threads, total = max(1, round(shares.cpus_per_probe)), sum(stop - start for start, stop in missing)
    try:
        ray.get([task.remote(parts, bounds, threads, ctx.board, total) for bounds in missing])
    finally:
        ctx.board.remove("reference")


def _make_part(parts: FeatureParts, bounds: tuple[int, int], threads: int, board: Board, total: int) -> None:
    torch.set_num_threads(threads)
    device = default_device()
    label = f"real images through {parts.spec.name}"
    parts.make(
        bounds, parts.spec.load(device), device, lambda done: board.add("reference", label, done, total, "images")
    )
