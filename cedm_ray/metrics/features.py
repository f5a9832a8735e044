"""Features as scores take them: sets of vectors that are read a block at a time."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cedm_ray.errors import require

Features = Tensor | NDArray[np.float32]
"""Features of some images, shape ``(N, D)``, float32: in memory, or a memory-mapped file."""


def check_features(block: int, **named: Features) -> None:
    """Refuse features that no score can be made of, reading them a block at a time.

    Raises:
        ValueError: If ``block`` is below 1, a set is empty or not ``(N, D)``, the D differ, or a value is not finite.
    """
    require(block >= 1, "block", block, "be at least 1")
    dims = {name: features.shape[1] if features.ndim == 2 else 0 for name, features in named.items()}
    for name, features in named.items():
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"{name} has shape {tuple(features.shape)}; (N, D) is due")
        if not all(x.isfinite().all() for _, x in blocks(features, block, "cpu")):
            raise ValueError(f"{name} holds NaN or infinite values; look at the images and at the detector")
    if len(set(dims.values())) > 1:
        raise ValueError(f"features have unlike dimensions: {', '.join(f'{n} {d}' for n, d in dims.items())}")


def blocks(features: Features, block: int, device: torch.device | str) -> Iterator[tuple[slice, Tensor]]:
    """The rows in order, ``block`` at a time: which they are, and they themselves, float64 on the device."""
    for start in range(0, len(features), block):
        rows = slice(start, min(start + block, len(features)))
        part = features[rows]
        x = part.detach() if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
        yield rows, x.to(device).double()
