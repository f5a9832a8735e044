"""How much of the storage a search will fill, estimated before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from cedm_ray.config import SearchConfig
from cedm_ray.data.registry import KNOWN_DATASETS, TEST_SPLITS
from cedm_ray.data.sources import ImageSource
from cedm_ray.diffusion.settings import NetSettings, build_net
from cedm_ray.features.backbones import PIXELS
from cedm_ray.features.checkpoints import LOCAL_MODELS
from cedm_ray.features.open_clip_backbone import OPEN_CLIP, split_name
from cedm_ray.metrics.dinov2 import DINOV2_DIM
from cedm_ray.metrics.inception import InceptionDetector
from cedm_ray.metrics.lenet import FEATURE_DIM
from cedm_ray.settings import SEARCHED
from cedm_ray.stages.budget.plan import Plan
from cedm_ray.stages.budget.spending import workload
from cedm_ray.stages.checkup.finding import Finding
from cedm_ray.stages.inputs.features import MAX_KEPT
from cedm_ray.stages.storage.checkpoints import NEWEST_KEPT, STATE_COPIES
from cedm_ray.stages.storage.storage_errors import Disk, Need, bytes_in_words

INCEPTION_LOGITS = 1008
AROUND = 100_000_000
"""Bytes for what is small: figures, logs, the MLflow database, heads of clusterings."""
NUM_IMAGES = {"digits": 1_797, "cifar10": 50_000, "cifar100": 50_000, "ffhq64": 70_000, "afhq64": 15_803}


@dataclass(frozen=True)
class ImageSet:
    """How many images of which size."""

    num_images: int
    resolution: int
    """Side in pixels."""
    channels: int
    has_labels: bool

    @classmethod
    def of_source(cls, source: ImageSource) -> ImageSet:
        """Images that are there."""
        return cls(len(source), source.resolution, source.channels, source.num_classes is not None)

    @classmethod
    def of(cls, config: SearchConfig, source: ImageSource | None) -> ImageSet | None:
        """The images of a search; of a named data set also where its files are not there, else None then."""
        if source is not None:
            return cls.of_source(source)
        name = config.dataset
        if name not in NUM_IMAGES:
            return None
        num_images = min(NUM_IMAGES[name], config.max_images or NUM_IMAGES[name])
        return cls(num_images, KNOWN_DATASETS[name], 1 if name == "digits" else 3, name in (*TEST_SPLITS, "digits"))


@dataclass(frozen=True)
class DiskNeed:
    """What a search will store, in bytes, by what it is."""

    parts: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        return sum(size for _, size in self.parts)

    def __str__(self) -> str:
        largest = max(self.parts, key=lambda part: part[1])
        return f"{bytes_in_words(self.total)}, {bytes_in_words(largest[1])} of them {largest[0]}"


def disk_needed(config: SearchConfig, images: ImageSet, num_trials: int, *, least: bool = False) -> DiskNeed:
    """What a search will store that starts with an empty storage path; an estimate.

    Args:
        config: The settings.
        images: The images.
        num_trials: Trainings, each of which keeps checkpoints.
        least: Take it that every training is best at its end, so that it keeps no third state.
    """
    n, pixels = images.num_images, images.channels * images.resolution**2
    embedded = 2 * embedding_dim(config.backbone, pixels)  # Parquet, and one array
    if config.grouping == "clip":
        embedded += 2 * embedding_dim(config.clip.model, pixels)
    probes = num_trials + (config.bound.max_probes if config.grouping in SEARCHED else 0)
    widths = feature_widths(config)
    real = n if n <= MAX_KEPT else 0
    stats = sum(8 * width**2 for width in widths)  # float64 covariances: of the references, and with the model
    state = checkpoint_bytes(config.diffusion, images)
    kept = kept_bytes(state, len(config.granularity.rungs_kimg()), NEWEST_KEPT + (not least))
    return DiskNeed(
        (
            ("images", n * pixels),
            ("embeddings", 4 * n * (embedded + config.num_neighbors)),
            ("clusterings", probes * n * 12),
            ("features", 4 * (real + config.final.num_images) * sum(widths) + 2 * stats),
            # The final training adds two, and one is written before an old one is thinned.
            ("checkpoints", num_trials * kept + 2 * state),
            ("the exported model", state // STATE_COPIES + 12 * n),
            ("figures and logs", AROUND),
        )
    )


def kept_bytes(state: int, num_rungs: int, states: int) -> int:
    """What the checkpoints of one training take, of which old ones are thinned to the averaged weights.

    Args:
        state: Bytes of one that is whole.
        num_rungs: How many there are.
        states: How many of them stay whole, at most.
    """
    whole = min(num_rungs, states)
    return whole * state + (num_rungs - whole) * (state // STATE_COPIES)


def checkpoint_bytes(net: NetSettings, images: ImageSet) -> int:
    """Size of one checkpoint of a training."""
    return STATE_COPIES * 4 * _num_parameters(net, images.resolution, images.channels)


@lru_cache
def _num_parameters(net: NetSettings, resolution: int, channels: int) -> int:
    with torch.device("meta"):
        built = build_net(net, resolution, channels, label_dim=100, augment=True)
    return sum(parameter.numel() for parameter in built.parameters())


def feature_widths(config: SearchConfig) -> list[int]:
    """Numbers that each detector keeps of an image; the backbone's are its embeddings."""
    widths = {"inception": InceptionDetector.dim + INCEPTION_LOGITS, "dinov2": DINOV2_DIM, "lenet": FEATURE_DIM}
    return [widths[name] for name in config.score.detectors if name in widths]


@lru_cache
def embedding_dim(backbone: str, pixels: int) -> int:
    """Dimensions of an embedding, without weights; ``pixels`` is how many numbers an image holds."""
    if backbone == PIXELS:
        return pixels
    if backbone.startswith(OPEN_CLIP):
        import open_clip

        return int(open_clip.get_model_config(split_name(backbone)[0])["embed_dim"])
    import timm

    local = LOCAL_MODELS.get(backbone)
    with torch.device("meta"):
        model = timm.create_model(local.architecture if local else backbone, pretrained=False, num_classes=0)
    return int(getattr(model, "head_hidden_size", None) or model.num_features)


def trials_of(config: SearchConfig, images: ImageSet) -> tuple[int, int]:
    """How many trainings a search makes at least and at most, baselines included, as far as its budget is in images."""
    work, settings = workload(config, has_labels=images.has_labels), config.granularity
    if not work.grid_points:
        return work.num_baselines, work.num_baselines
    allowed_kimg = Plan(config, work, None, None).search_kimg
    whole = settings.rule_name(space=bool(config.space)) == "none"
    each_kimg = settings.total_kimg if whole else settings.rungs_kimg()[0]
    most = work.grid_points if allowed_kimg is None else min(work.grid_points, int(allowed_kimg // each_kimg))
    most = max(1, min(most, settings.num_trials or most))
    least = min(most, settings.startup_trials)
    return least + work.num_baselines, most + work.num_baselines + work.num_confirmed


def disk_finding(config: SearchConfig, images: ImageSet, storage: Path) -> Finding:
    """Whether the storage path has room for what is still to be stored.

    What the store holds already counts as stored, whichever search it is of: a search that goes on is not refused for
    what it has itself.

    Args:
        config: The settings.
        images: The images.
        storage: The storage path, or where it will be made.
    """
    fewest, all_trials = trials_of(config, images)
    least, most = disk_needed(config, images, fewest, least=True), disk_needed(config, images, all_trials)
    free, stored = Disk.storage(storage).free, stored_bytes(storage / "store")
    text = f"{bytes_in_words(free)} free under {storage}"
    text += f" and {bytes_in_words(stored)} stored" if stored else ""
    fix = "make room, or give another --storage-path"
    if free + stored < least.total:
        return Finding("disk", "fail", f"{text}; the search needs at least {least}", fix)
    if free + stored < most.total:
        return Finding("disk", "warn", f"{text}; the search may need {most}", fix)
    return Finding("disk", "ok", f"{text}; the search needs at most {most}")


def still_needed(config: SearchConfig, images: ImageSet, storage: Path) -> Need:
    """What a search may still store, beside what the store holds already."""
    most = disk_needed(config, images, trials_of(config, images)[1])
    left = most.total - stored_bytes(storage / "store")
    return Need("the rest of the search", max(left, checkpoint_bytes(config.diffusion, images)))


def stored_bytes(folder: Path) -> int:
    """Bytes in the files below a folder; 0 where there is none."""
    sizes = 0
    for file in folder.rglob("*"):
        try:
            sizes += file.lstat().st_size
        except OSError:  # gone since it was listed
            continue
    return sizes
