"""Features of stored images, made in parts that are kept: what is cut off loses one part, and nothing is made twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cedm_ray.metrics.detectors import Detector, features_and_logits
from cedm_ray.metrics.frechet import FeatureSums
from cedm_ray.metrics.stats import FeatureStats, StatsFacts, load_sums, save_sums
from cedm_ray.stages.inputs.detectors import DetectorSpec, detector_facts
from cedm_ray.stages.inputs.images import images_here
from cedm_ray.stages.storage.bucket_entries import here
from cedm_ray.stages.storage.store import Store

FEATURES_FILE, LOGITS_FILE, SUMS_FILE = "features.npy", "logits.npy", "sums.safetensors"
PART = 2500
"""Images whose features are one entry of the store."""
MAX_KEPT = 100_000
"""Images of a data set whose features are kept; of larger ones only sums are."""
NUM_SUM_PARTS = 32
"""Entries of a larger data set."""
BATCH = 64


@dataclass(frozen=True)
class FeatureParts:
    """The features of one set of packed images by one detector, in parts.

    Each part is an entry of the store with the features (and class scores) of a block of images; of more than
    100,000 images only float64 sums are kept, so that no data set fills the storage.
    """

    images: Path
    """Folder of the packed images."""
    spec: DetectorSpec
    store: Store

    @property
    def kept(self) -> bool:
        """Whether features are kept, not just their sums."""
        return len(images_here(self.images)) <= MAX_KEPT

    def bounds(self) -> list[tuple[int, int]]:
        """First image of each part, and the one after its last; they do not depend on the number of workers."""
        num_images = len(images_here(self.images))
        size = PART if self.kept else -(-num_images // NUM_SUM_PARTS)
        return [(start, min(start + size, num_images)) for start in range(0, num_images, size)]

    def inputs(self, bounds: tuple[int, int]) -> dict[str, Any]:
        """What a part is made from."""
        return {
            "images": images_here(self.images).facts.pixels_sha256,
            "detector": self.spec.name,
            "backbone": self.spec.backbone.name if self.spec.backbone else None,
            "weights": self.spec.weights_hash,
            "bounds": list(bounds),
        }

    def path(self, bounds: tuple[int, int]) -> Path:
        return self.store.path("features", self.inputs(bounds))

    def missing(self) -> list[tuple[int, int]]:
        """Parts that are still to be made."""
        return [bounds for bounds in self.bounds() if self.store.facts(self.path(bounds)) is None]

    def make(
        self, bounds: tuple[int, int], detector: Detector, device: torch.device, on_images: Callable[[int], None]
    ) -> None:
        """Make one part.

        Args:
            bounds: One of :meth:`bounds`.
            detector: The loaded detector.
            device: Where it computes.
            on_images: Is told how many more images are done.
        """
        packed, path, facts = images_here(self.images), self.path(bounds), {"made_by": detector_facts(detector)}
        features, logits, sums, kept = [], [], FeatureSums(detector.dim, device=device), self.kept
        for start in range(*bounds, BATCH):
            block = torch.from_numpy(packed.read(start, min(start + BATCH, bounds[1]))).to(device)
            found, scores = features_and_logits(detector, block)
            if kept:
                features.append(found.cpu())
                logits += [scores.cpu()] if scores is not None else []
            else:
                sums.update(found)
            on_images(len(block))
        with self.store.create(path, self.inputs(bounds), facts) as scratch:
            if not kept:
                save_sums(sums, scratch / SUMS_FILE)
            for blocks, name in ((features, FEATURES_FILE), (logits, LOGITS_FILE)):
                if blocks:
                    np.save(scratch / name, torch.cat(blocks).numpy(), allow_pickle=False)

    def make_missing(self, device: torch.device, on_images: Callable[[int], None]) -> None:
        """Make what is missing in this process; the detector is loaded only if something is."""
        missing = self.missing()
        if missing:
            detector = self.spec.load(device)
            for bounds in missing:
                self.make(bounds, detector, device, on_images)

    def features(self) -> NDArray[np.float32]:
        """All features, shape ``(N, D)``, float32."""
        return np.concatenate([_read(self.path(bounds) / FEATURES_FILE) for bounds in self.bounds()])

    def logits(self) -> NDArray[np.float32] | None:
        """All class scores, shape ``(N, K)``, float32; None where the detector has no classifier."""
        files = [here(self.path(bounds) / LOGITS_FILE) for bounds in self.bounds()]
        return np.concatenate([_read(file) for file in files]) if all(file.is_file() for file in files) else None

    def facts(self) -> dict[str, Any]:
        """Detector, weights, resize, dtype and dimensions behind the features."""
        found: dict[str, Any] = (self.store.facts(self.path(self.bounds()[0])) or {})["made_by"]
        return found

    def stats_facts(self) -> StatsFacts:
        """The same with the number of images."""
        return StatsFacts(**self.facts(), count=len(images_here(self.images)))

    def stats(self) -> FeatureStats:
        """Mean and covariance over all images: merged in the order of the images, whoever made the parts."""
        facts, kept = self.facts(), self.kept
        sums = FeatureSums(facts["dim"])
        for bounds in self.bounds():
            path = self.path(bounds)
            if kept:
                sums.update(torch.from_numpy(_read(path / FEATURES_FILE)))
            else:
                sums.merge(load_sums(here(path / SUMS_FILE)))
        return FeatureStats(*sums.mean_cov(), StatsFacts(**facts, count=int(sums.count)))


def _read(file: Path) -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.load(here(file), allow_pickle=False)
    return found
