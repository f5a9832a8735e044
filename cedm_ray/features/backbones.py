"""Models that turn images into embeddings, by name: timm's, OpenCLIP's, a few published ones, and the pixels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cedm_ray.errors import UserError
from cedm_ray.features.backbone_weights import BACKBONE
from cedm_ray.features.model_backbone import Dtype, compute_dtype
from cedm_ray.features.open_clip_backbone import OPEN_CLIP, check_open_clip, open_clip_backbone
from cedm_ray.features.pixels import PixelBackbone, PixelStats
from cedm_ray.features.timm_backbone import check_timm, timm_backbone
from cedm_ray.weights.files import check_weight_file
from cedm_ray.weights.listing import file_sha256

# timm and open_clip are imported where they are used: that takes seconds, and most processes need no backbone.
PIXELS = PixelBackbone.name


class Backbone(Protocol):
    """A fixed map from images to embeddings."""

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def resize(self) -> str:
        """How images are brought to the model's size."""

    @property
    def dtype(self) -> Dtype:
        """Arithmetic of the network; the same image has other embeddings in the other one."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Embeddings ``(B, D)`` float32 of images ``(B, C, H, W)`` uint8."""


def check_backbone(name: str, weights: Path | None) -> str:
    """Refuse a backbone that cannot be there, without building it.

    Args:
        name: ``pixels``, a timm name with or without a pretrained tag, a name of ``checkpoints.LOCAL_MODELS``, or
            ``open_clip:ARCH/TAG``.
        weights: File with the weights, or None.

    Returns:
        What identifies the weights: the SHA-256 of the file, else the name, which stands for the library's own weights.

    Raises:
        UserError: If the name is unknown, or the file is missing or no weight file.
    """
    if name == PIXELS:
        if weights is not None:
            raise UserError(f"backbone {PIXELS} has no weights; leave out --backbone-weights {weights}")
    elif name.startswith(OPEN_CLIP):
        check_open_clip(name, weights)
    else:
        check_timm(name, weights)
    if weights is None:
        return name
    check_weight_file(weights, BACKBONE)
    return file_sha256(weights)


def load_backbone(
    name: str, weights: Path | None, *, device: torch.device | str, pixel_stats: PixelStats | None = None
) -> Backbone:
    """A backbone, ready to use.

    Args:
        name: As for :func:`check_backbone`.
        weights: File with the weights: safetensors, or a file of ``torch.save`` with tensors and plain values alone;
            None for the library's own.
        device: Where to compute: on a CUDA device the network runs in bfloat16, elsewhere in float32.
        pixel_stats: Of the dataset; needed for ``pixels``.

    Raises:
        UserError: If the weights cannot be had or do not fit.
        ValueError: If ``pixels`` is asked for without statistics.
    """
    if name == PIXELS:
        if pixel_stats is None:
            raise ValueError("pixel_stats is None; the backbone pixels needs those of the dataset")
        return PixelBackbone(pixel_stats, device)
    build = open_clip_backbone if name.startswith(OPEN_CLIP) else timm_backbone
    return build(name, weights, device=device, dtype=compute_dtype(device))


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone and the images it is for, small enough to travel to every process that loads it."""

    name: str
    weights: Path | None
    pixel_stats: PixelStats | None

    def load(self, device: torch.device | str) -> Backbone:
        """The backbone, as :func:`load_backbone` gives it."""
        return load_backbone(self.name, self.weights, device=device, pixel_stats=self.pixel_stats)
