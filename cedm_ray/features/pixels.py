"""Pixels as features, for images so small that no backbone knows them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class PixelStats:
    """Mean of each pixel ``(C, H, W)`` and standard deviation of each channel ``(C, 1, 1)``, both float32.

    One scale for a whole channel, not one for each pixel: that would blow up the noise of dark borders.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.mean.ndim != 3 or self.std.shape != (len(self.mean), 1, 1) or not (self.std > 0).all():
            raise ValueError(f"mean has shape {self.mean.shape}; std must have one positive number per channel")


def pixel_stats(images: NDArray[np.uint8]) -> PixelStats:
    """The statistics of images ``(N, C, H, W)`` uint8, read in blocks."""
    total = np.zeros(images.shape[1:])
    squares = np.zeros(images.shape[1:])
    for start in range(0, len(images), _BLOCK):
        block = images[start : start + _BLOCK].astype(np.float64)
        total += block.sum(axis=0)
        squares += np.square(block).sum(axis=0)
    mean = total / len(images)
    variance = (squares / len(images) - mean**2).mean(axis=(1, 2), keepdims=True)
    std = np.sqrt(np.maximum(variance, 0))
    return PixelStats(mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32))


class PixelBackbone:
    """Flattened pixels, each at mean 0, each channel at standard deviation 1 over the dataset.

    Args:
        stats: Of the dataset.
        device: Where features are computed.
    """

    name = "pixels"
    resize = "none"
    dtype: Literal["float32"] = "float32"

    def __init__(self, stats: PixelStats, device: torch.device | str) -> None:
        self.dim = stats.mean.size
        self._mean = torch.from_numpy(stats.mean.copy()).to(device)
        self._std = torch.from_numpy(stats.std.copy()).to(device)

    def __call__(self, images: Tensor, /) -> Tensor:
        """Features ``(B, C * H * W)`` float32 of images ``(B, C, H, W)`` uint8."""
        if images.dtype != torch.uint8 or images.shape[1:] != self._mean.shape:
            shape = tuple(self._mean.shape)
            raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; uint8 (B, *{shape}) is due")
        return ((images.to(torch.float32) - self._mean) / self._std).flatten(1)
