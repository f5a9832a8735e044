"""The detectors that score: checked before any work, small enough to travel, loaded where they are needed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cedm_ray.errors import UserError
from cedm_ray.features.backbones import BackboneSpec
from cedm_ray.metrics.detectors import Detector, FunctionDetector
from cedm_ray.metrics.dinov2 import check_dinov2, load_dinov2
from cedm_ray.metrics.inception import check_inception, load_inception
from cedm_ray.metrics.lenet import load_lenet, save_lenet, train_lenet
from cedm_ray.settings import DetectorName
from cedm_ray.stages.inputs.images import images_here
from cedm_ray.stages.storage.bucket_entries import here
from cedm_ray.stages.storage.paths import absolute
from cedm_ray.stages.storage.store import Store

LENET_FILE = "lenet.safetensors"


def try_detectors(names: Collection[DetectorName], detector_weights: Path | None, dinov2_weights: Path | None) -> None:
    """Load the detectors that need weight files once, so that what does not fit is found before hours are spent.

    Raises:
        UserError: If weights cannot be had or do not fit.
    """
    files = {"inception": detector_weights, "dinov2": dinov2_weights}
    for name in names:
        if name in files:
            DetectorSpec(name, absolute(files[name]), "").load(torch.device("cpu"))


def check_detectors(
    names: Collection[DetectorName], detector_weights: Path | None, dinov2_weights: Path | None
) -> dict[str, str]:
    """Refuse detectors whose weights cannot be had, without building any.

    Args:
        names: The wanted detectors.
        detector_weights: File with Inception's weights; None for the canonical ones.
        dinov2_weights: File with DINOv2's weights; None for timm's.

    Returns:
        What identifies the weights of each that comes from a file or the network.

    Raises:
        UserError: If weights are missing, unreachable or no such weights.
    """
    checks = {
        "inception": lambda: check_inception(absolute(detector_weights)),
        "dinov2": lambda: check_dinov2(absolute(dinov2_weights)),
    }
    return {name: checks[name]() for name in names if name in checks}


@dataclass(frozen=True)
class DetectorSpec:
    """A detector, small enough to travel to every process that loads it."""

    name: DetectorName
    weights: Path | None
    """File with its weights; None for the canonical ones."""
    weights_hash: str
    backbone: BackboneSpec | None = None

    def load(self, device: torch.device) -> Detector:
        """The detector, on a device."""
        if self.name == "inception":
            return load_inception(self.weights, device=device)
        if self.name == "dinov2":
            return load_dinov2(self.weights, device=device)
        if self.name == "lenet" and self.weights is not None:
            return load_lenet(here(self.weights), device=device)
        if self.backbone is None:
            raise ValueError(f"detector {self.name} has neither weights nor a backbone")
        backbone = self.backbone.load(device)
        return FunctionDetector(
            backbone.name, backbone.dim, backbone, resize=backbone.resize, weights_hash=self.weights_hash
        )


def lenet_spec(images: Path, store: Store) -> DetectorSpec:
    """The classifier of a labelled toy set as a detector, from the store or trained now.

    Raises:
        UserError: If the images have no labels.
    """
    packed = images_here(images)
    inputs: dict[str, Any] = {"images": packed.facts.pixels_sha256, "detector": "lenet", "seed": 0}
    path = store.path("detectors", inputs)
    if store.facts(path) is None:
        torch.set_num_threads(1)  # one number of threads everywhere: the same weights from the same machine
        labels = packed.labels()
        if labels is None or packed.num_classes is None:
            raise UserError("detector lenet is trained on labels, and these images have none; name another detector")
        pixels = torch.from_numpy(np.array(packed.images))
        lenet = train_lenet(pixels, torch.from_numpy(labels), packed.num_classes, seed=0)
        with store.create(path, inputs, {"weights_hash": lenet.weights_hash}) as scratch:
            save_lenet(lenet, scratch / LENET_FILE)
    return DetectorSpec("lenet", path / LENET_FILE, (store.facts(path) or {})["weights_hash"])


def detector_facts(detector: Detector, dtype: str = "float32") -> dict[str, Any]:
    """What makes two scores of a detector comparable, but for the number of images."""
    return {
        "detector": detector.name,
        "weights_hash": detector.weights_hash,
        "resize": detector.resize,
        "dtype": dtype,
        "dim": detector.dim,
    }
