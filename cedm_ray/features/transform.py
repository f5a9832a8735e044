"""From uint8 images to what a backbone takes, on the device where the images are."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CropMode = Literal["center", "squash"]


@dataclass(frozen=True)
class Transform:
    """Resize, centre crop and normalise, as a backbone's own evaluation does it.

    Raises:
        ValueError: If a value lies outside its bounds.
    """

    size: tuple[int, int]
    """Height and width of the result, in pixels."""
    interpolation: str
    """``bicubic`` or ``bilinear``."""
    crop_share: float
    """Share of the resized image that the crop keeps along each axis, in (0, 1]."""
    crop_mode: CropMode
    """``center``: keep the aspect ratio and cut off what stands over; ``squash``: bring both axes to size."""
    mean: tuple[float, ...]
    """Mean of each channel that the backbone expects, for values in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each channel that the backbone expects."""

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation is {self.interpolation}; it must be bicubic or bilinear")
        if self.crop_mode not in ("center", "squash"):
            raise ValueError(f"crop_mode is {self.crop_mode}; it must be center or squash")
        if not 0 < self.crop_share <= 1:
            raise ValueError(f"crop_share is {self.crop_share}; it must lie in (0, 1]")

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare a batch.

        Args:
            images: Images, shape ``(B, 1 or 3, H, W)``, uint8; a single channel is repeated.

        Returns:
            Input of the backbone, shape ``(B, 3, *size)``, float32.

        Raises:
            ValueError: If the images have another dtype or number of channels.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images have shape {tuple(images.shape)} and dtype {images.dtype}; (B, 1 or 3, H, W) uint8"
            )
        pixels = images.float().expand(-1, 3, -1, -1)
        # As PIL does it: antialiased, widths before heights, and rounded to uint8's range after each.
        height, width = self._resized(pixels.shape[2:])
        resized = self._stretch(self._stretch(pixels, (pixels.shape[2], width)), (height, width))
        unit = _center_crop(resized, self.size) / 255
        mean = torch.tensor(self.mean, device=unit.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=unit.device).view(1, -1, 1, 1)
        return (unit - mean) / std

    def _stretch(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        stretched = F.interpolate(pixels, size, mode=self.interpolation, antialias=True)
        return stretched.clamp(0, 255).round()

    def _resized(self, shape: torch.Size) -> tuple[int, int]:
        """Height and width before the crop."""
        scaled = (math.floor(self.size[0] / self.crop_share), math.floor(self.size[1] / self.crop_share))
        if self.crop_mode == "squash" or shape[0] == shape[1]:
            return scaled
        ratio = max(scaled[0] / shape[0], scaled[1] / shape[1])  # the axis that needs more decides
        return max(scaled[0], int(shape[0] * ratio)), max(scaled[1], int(shape[1] * ratio))


def _center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    top = round((images.shape[2] - size[0]) / 2)
    left = round((images.shape[3] - size[1]) / 2)
    return images[:, :, top : top + size[0], left : left + size[1]]
