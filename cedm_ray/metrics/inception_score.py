"""The Inception Score: how sure a classifier is of each generated image, and how varied its answers are."""

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cedm_ray.errors import UserError, require


def inception_score(
    logits: Tensor | NDArray[np.float32], *, splits: int = 10, shuffle_seed: int = 2020
) -> tuple[float, float]:
    """Exponential of the mean divergence of each image's class probabilities from those of all images.

    Computed in float64, a split at a time. The images are shuffled and split as torch-fidelity does it.

    Args:
        logits: What the classifier says of generated images before the softmax, shape ``(N, K)``, float32.
        splits: Parts that are scored apart.
        shuffle_seed: Of the order in which images are dealt to the splits.

    Returns:
        Mean and standard deviation over the splits; each score lies in ``[1, K]``.

    Raises:
        UserError: If there are fewer images than splits.
        ValueError: If ``splits`` is below 1, ``logits`` are not ``(N, K)`` or a value is not finite.

    Source: arXiv 1606.03498, Sec. 4.
    """
    require(splits >= 1, "splits", splits, "be at least 1")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; (N, K) is due")
    n = len(logits)
    if n < splits:
        raise UserError(f"{n} images are too few for {splits} splits: score more images or lower splits")
    order = np.random.RandomState(shuffle_seed).permutation(n)
    bounds = [i * n // splits for i in range(splits + 1)]
    scores = [_score(_rows(logits, order[a:b])) for a, b in pairwise(bounds)]
    return float(np.mean(scores)), float(np.std(scores))


def _rows(logits: Tensor | NDArray[np.float32], indices: NDArray[np.int64]) -> Tensor:
    """Some of the logits in float64."""
    if isinstance(logits, Tensor):
        picked = logits.detach()[torch.from_numpy(indices).to(logits.device)]
    else:
        picked = torch.from_numpy(logits[indices])
    if not picked.isfinite().all():
        raise ValueError("logits hold NaN or infinite values; look at the images and at the classifier")
    return picked.double()


def _score(logits: Tensor) -> float:
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    log_mean = p.mean(0).log()
    # A class whose probability is 0 in float64 adds nothing, although its logarithm in the mean may be infinite.
    divergences = torch.where(p > 0, p * (log_p - log_mean), 0.0).sum(1)
    return float(divergences.mean().exp())
