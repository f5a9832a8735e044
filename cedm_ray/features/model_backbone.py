"""A network behind its own resize, crop and normalisation, all done on the device."""

from typing import Literal

import torch
from torch import Tensor, nn

from cedm_ray.features.transform import Transform

Dtype = Literal["float32", "bfloat16"]


def compute_dtype(device: torch.device | str) -> Dtype:
    """The arithmetic of a backbone's network: bfloat16 on a CUDA device, float32 elsewhere."""
    return "bfloat16" if torch.device(device).type == "cuda" else "float32"


class ModelBackbone:
    """A network as a backbone.

    Args:
        name: Name of the backbone.
        model: Maps ``(B, 3, H, W)`` float32 to ``(B, dim)``; it is moved, and frozen in evaluation mode.
        dim: Feature dimensions D.
        transform: From images to the network's input, in float32 everywhere.
        device: Where to compute.
        dtype: Arithmetic of the network; ``bfloat16`` runs it under ``torch.autocast``.
    """

    def __init__(
        self, name: str, model: nn.Module, dim: int, transform: Transform, *, device: torch.device | str, dtype: Dtype
    ) -> None:
        self.name, self.dim, self.transform, self.dtype = name, dim, transform, dtype
        self._model = model.to(device).eval().requires_grad_(False)
        self._device_type = torch.device(device).type

    @property
    def resize(self) -> str:
        """How images are brought to the model's size."""
        t = self.transform
        return f"{t.interpolation}, antialiased, to {t.size[0]} px / {t.crop_share:g}, {t.crop_mode} crop"

    @torch.no_grad()
    def __call__(self, images: Tensor, /) -> Tensor:
        """Embeddings ``(B, D)`` float32 of images ``(B, 1 or 3, H, W)`` uint8."""
        pixels = self.transform(images)
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            features: Tensor = self._model(pixels)
        return features.to(torch.float32)
