"""Features of stored images, made in parts that are kept: what is cut off loses one part, and nothing is made twice."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cedm_ray.data.pack import IMAGES, PackedImages, load_packed
from cedm_ray.errors import UserError
from cedm_ray.features.backbones import BackboneSpec
from cedm_ray.metrics.detectors import Detector, FunctionDetector, features_and_logits
from cedm_ray.metrics.dinov2 import check_dinov2, load_dinov2
from cedm_ray.metrics.frechet import FeatureSums
from cedm_ray.metrics.inception import check_inception, load_inception
from cedm_ray.metrics.lenet import load_lenet, save_lenet, train_lenet
from cedm_ray.metrics.stats import FeatureStats, StatsFacts, load_sums, save_sums
from cedm_ray.settings import DetectorName
from cedm_ray.stages.bucket_entries import here
from cedm_ray.stages.store import Store

FEATURES_FILE, LOGITS_FILE, SUMS_FILE = "features.npy", "logits.npy", "sums.safetensors"
LENET_FILE = "lenet.safetensors"
PART = 2500
MAX_KEPT = 100_000  # images of a data set whose features are kept; of larger ones only sums are
NUM_SUM_PARTS = 32
BATCH = 64


def load_detectors(names: Collection[DetectorName], detector_weights: Path | None, dinov2_weights: Path | None) -> None:
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


def absolute(path: Path | None) -> Path | None:
    """The same file for a process in another folder."""
    return None if path is None else path.expanduser().absolute()


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
    packed = _packed(images)
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


@dataclass(frozen=True)
class FeatureParts:
    """The features of one pile of packed images by one detector, in parts.

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
        return len(_packed(self.images)) <= MAX_KEPT

    def bounds(self) -> list[tuple[int, int]]:
        """First image of each part, and the one after its last; they do not depend on the number of workers."""
        num_images = len(_packed(self.images))
        size = PART if num_images <= MAX_KEPT else -(-num_images // NUM_SUM_PARTS)
        return [(start, min(start + size, num_images)) for start in range(0, num_images, size)]

    def inputs(self, bounds: tuple[int, int]) -> dict[str, Any]:
        """What a part is made from."""
        return {
            "images": _packed(self.images).facts.pixels_sha256,
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
        packed, path, facts = _packed(self.images), self.path(bounds), {"made_by": detector_facts(detector)}
        features, logits, sums = [], [], FeatureSums(detector.dim, device=device)
        for start in range(*bounds, BATCH):
            block = torch.from_numpy(packed.read(start, min(start + BATCH, bounds[1]))).to(device)
            found, scores = features_and_logits(detector, block)
            if self.kept:
                features.append(found.cpu())
                logits += [scores.cpu()] if scores is not None else []
            else:
                sums.update(found)
            on_images(len(block))
        with self.store.create(path, self.inputs(bounds), facts) as scratch:
            if not self.kept:
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
        return StatsFacts(**self.facts(), count=len(_packed(self.images)))

    def stats(self) -> FeatureStats:
        """Mean and covariance over all images: merged in the order of the images, whoever made the parts."""
        sums = FeatureSums(self.facts()["dim"])
        for bounds in self.bounds():
            path = self.path(bounds)
            if self.kept:
                sums.update(torch.from_numpy(_read(path / FEATURES_FILE)))
            else:
                sums.merge(load_sums(here(path / SUMS_FILE)))
        return stats_of(sums, self.facts())


def _packed(images: Path) -> PackedImages:
    return load_packed(here(images / IMAGES).parent)


def _read(file: Path) -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.load(here(file), allow_pickle=False)
    return found


def detector_facts(detector: Detector, dtype: str = "float32") -> dict[str, Any]:
    """What makes two scores of a detector comparable, but for the number of images."""
    return {
        "detector": detector.name,
        "weights_hash": detector.weights_hash,
        "resize": detector.resize,
        "dtype": dtype,
        "dim": detector.dim,
    }


def stats_of(sums: FeatureSums, facts: dict[str, Any]) -> FeatureStats:
    """Statistics from sums, with their facts."""
    return FeatureStats(*sums.mean_cov(), StatsFacts(**facts, count=int(sums.count)))
