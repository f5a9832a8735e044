"""What sampling starts from: the noise and the cluster of each image, found again from its number."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cedm_ray.diffusion.streams import Purpose, numpy_stream


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Unit Gaussian noise of the images ``indices``; image i depends on ``(seed, i)`` alone.

    Args:
        seed: Seed of the set of images.
        indices: Which images, each in ``[0, 2^64)``.
        shape: Shape of one image.
        device: Where the result lies; the numbers are drawn on the CPU and so are the same on every device.

    Returns:
        Shape ``(len(indices), *shape)``, float32.
    """
    noise = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in zip(noise, indices, strict=True):
        numpy_stream(seed, Purpose.NOISE, index).standard_normal(dtype=np.float32, out=row)
    return onto(torch.from_numpy(noise), device)


def draw_conditions(seed: int, indices: Sequence[int], cluster_probs: Tensor) -> Tensor:
    """Draw the cluster of each image from q(c); image i depends on ``(seed, i)`` and q alone.

    The draw inverts the cumulative distribution at one uniform number from a stream of its own: the noise of an
    image is the same whatever the clustering, so that grids of different clusterings compare image by image.

    Args:
        seed: Seed of the set of images.
        indices: Which images.
        cluster_probs: q(c), shape ``(C,)``, non-negative; it is normalised to sum 1.

    Returns:
        Shape ``(len(indices),)``, int64 in ``[0, C)``, on the CPU; a cluster of probability 0 is never drawn.

    Raises:
        ValueError: If ``cluster_probs`` is negative, not finite, or sums to 0.

    Source: arXiv 2403.00570, Sec. 3.2.
    """
    probs = cluster_probs.detach().to("cpu", torch.float64).numpy()
    if probs.ndim != 1 or not np.isfinite(probs).all() or (probs < 0).any() or probs.sum() <= 0:
        raise ValueError("cluster_probs must be one row of finite, non-negative numbers with a positive sum")
    cumulative = probs.cumsum()
    # Divided by its own last entry it ends at exactly 1, so no uniform number falls behind the last used cluster.
    cumulative /= cumulative[-1]
    uniform = np.array([numpy_stream(seed, Purpose.CONDITION, index).random() for index in indices])
    return torch.from_numpy(np.searchsorted(cumulative, uniform, side="right").astype(np.int64))


def onto(rows: Tensor, device: torch.device | str) -> Tensor:
    """The rows on the device; a GPU fetches them in its turn, and neither waits for the other."""
    if torch.device(device).type != "cuda":
        return rows.to(device)
    return rows.pin_memory().to(device, non_blocking=True)
