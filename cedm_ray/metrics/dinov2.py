"""The detector behind FDD: DINOv2 ViT-L/14, without registers, on images of 224 pixels."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cedm_ray.metrics.detector_weights import read_tensors
from cedm_ray.metrics.detectors import check_images
from cedm_ray.metrics.float32 import full_float32
from cedm_ray.weights.files import WeightKind, check_weight_file, fill
from cedm_ray.weights.hub import fetching
from cedm_ray.weights.listing import file_sha256

DINOV2_DIM = 1024
"""Dimensions of the features."""

_ARCHITECTURE = "vit_large_patch14_dinov2"
_TAG = "lvd142m"
_SIZE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_GRID_OFFSET = 0.1
_DINOV2 = WeightKind("detector", "--dinov2-weights")


class DinoV2Detector:
    """DINOv2's class token after the last norm, behind the resize of the FDD paper; float32, also on CUDA.

    Args:
        model: timm's DINOv2 for inputs of 224 pixels, filled.
        weights_hash: SHA-256 of the weight file, or timm's name for weights that it fetched.
        device: Where to compute.

    Source: arXiv 2306.04675 and its released code: both sides to 224 px by PIL's bicubic, ImageNet's statistics.
    """

    name = "dinov2"
    resize = "bicubic to 224 px as PIL, antialiased"

    def __init__(self, model: Any, *, weights_hash: str, device: torch.device | str) -> None:
        self.weights_hash = weights_hash
        self._device = torch.device(device)
        self._model = model.to(self._device).eval().requires_grad_(False)
        self.dim = int(model.num_features)

    @torch.no_grad()
    def __call__(self, images: Tensor, /) -> Tensor:
        """Features ``(B, 1024)`` float32 of images ``(B, 1 or 3, H, W)`` uint8; one channel is repeated.

        Raises:
            ValueError: If the images have another dtype or number of channels.
        """
        check_images(images)
        with full_float32(self._device):
            features: Tensor = self._model(_prepared(images.to(self._device)))
        return features


def check_dinov2(weights: Path | None) -> str:
    """Refuse a weight file that cannot be one, without building the model.

    Args:
        weights: File with the weights; None for timm's own.

    Returns:
        What identifies the weights: the SHA-256 of the file, else timm's name for its own.

    Raises:
        UserError: If the file is missing or no weight file.
    """
    if weights is None:
        return f"{_ARCHITECTURE}.{_TAG}"
    check_weight_file(weights, _DINOV2)
    return file_sha256(weights)


def load_dinov2(weights: Path | None, *, device: torch.device | str) -> DinoV2Detector:
    """The detector, ready to use.

    Args:
        weights: A ``.safetensors``, ``.pth`` or ``.pt`` file of tensors by timm's or the official names; None for
            timm's own, from its cache or the network.
        device: Where to compute.

    Raises:
        UserError: If the weights cannot be had or do not fit.
    """
    return _load(weights, device, _ARCHITECTURE)


def _load(weights: Path | None, device: torch.device | str, architecture: str) -> DinoV2Detector:
    import timm

    identity = check_dinov2(weights)
    if weights is None:
        with fetching(f"the weights of detector {identity}", f"pass a file with them: {_DINOV2.flag} FILE"):
            model = timm.create_model(identity, pretrained=True, num_classes=0)
    else:
        # The official names are timm's, but for the token that stood for hidden patches in training. timm's own
        # checkpoint filter would drop it, too, and resample what it is given on the way, where a refusal is due.
        state = {name: value for name, value in read_tensors(weights, _DINOV2).items() if name != "mask_token"}
        model = timm.create_model(architecture, pretrained=False, num_classes=0)
        fill(model, state, source=f"detector weights {weights}", wanted="DINOv2 ViT-L/14 without registers")
    _to_size(model)
    return DinoV2Detector(model, weights_hash=identity, device=device)


@torch.no_grad()
def _to_size(model: Any) -> None:
    """Bring a model that was made for 518 pixels to 224."""
    official = _resampled(model.pos_embed, _SIZE // model.patch_embed.patch_size[0])
    model.set_input_size((_SIZE, _SIZE))
    model.pos_embed.copy_(official)


def _resampled(pos_embed: Tensor, side: int) -> Tensor:
    """Position embeddings ``(1, 1 + n * n, D)`` on another grid, ``(1, 1 + side * side, D)``, as DINOv2 itself does it.

    That is bicubic without antialiasing, and along a grid that is not quite the one asked for: the scale is
    (side + 0.1) / n, which the authors chose against rounding. timm's own resampling is antialiased and gives other
    features; published values of FDD come from this one.

    Source: arXiv 2304.07193, the released code (``interpolate_pos_encoding``).
    """
    first, rest = pos_embed[:, :1], pos_embed[:, 1:]
    n = round(rest.shape[1] ** 0.5)
    grid = rest.float().reshape(1, n, n, -1).permute(0, 3, 1, 2)
    scale = (side + _GRID_OFFSET) / n
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)


def _prepared(images: Tensor) -> Tensor:
    """uint8 ``(B, 1 or 3, H, W)`` to what DINOv2 takes, float32 ``(B, 3, 224, 224)``."""
    pixels = images.float().expand(-1, 3, -1, -1)
    # As PIL did it for the published values: widths before heights, and rounded to uint8's range after each.
    for size in ((pixels.shape[2], _SIZE), (_SIZE, _SIZE)):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255).round()
    mean = torch.tensor(_MEAN, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(_STD, device=pixels.device).view(1, 3, 1, 1)
    return (pixels / 255 - mean) / std
