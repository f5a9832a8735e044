"""The kernel distance (KID): how far apart two sets of features lie, without assuming Gaussians."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cedm_ray.errors import UserError, require
from cedm_ray.metrics.features import Features, check_features

_CHECK_BLOCK = 4096


def kid(
    real: Features, generated: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Squared maximum mean discrepancy of random subsets, with the kernel ``(x.y / D + 1)^3``.

    Computed in float64. The subsets are drawn as torch-fidelity draws them, real before generated, so that its value
    on the same features in float64 is the same.

    Args:
        real: Features of real images, shape ``(N, D)``.
        generated: Features of generated images, shape ``(M, D)``.
        subsets: Pairs of subsets.
        subset_size: Images of a subset, drawn without replacement.
        seed: Of the draws.

    Returns:
        Mean and standard deviation over the subsets. The estimate is unbiased, so it can fall below 0.

    Raises:
        UserError: If a set has fewer images than ``subset_size``.
        ValueError: If ``subsets`` is below 1, ``subset_size`` below 2, shapes do not match or a value is not finite.

    Source: arXiv 1801.01401, Sec. 4.
    """
    require(subsets >= 1, "subsets", subsets, "be at least 1")
    require(subset_size >= 2, "subset_size", subset_size, "be at least 2")
    check_features(_CHECK_BLOCK, real=real, generated=generated)
    for name, features in (("real", real), ("generated", generated)):
        if len(features) < subset_size:
            raise UserError(
                f"{len(features)} {name} images are too few for subset_size = {subset_size}: "
                f"score more images or lower subset_size to at most {len(features)}"
            )
    rng = np.random.RandomState(seed)  # the legacy generator, whose draws are those of the published values
    values = []
    for _ in range(subsets):
        x, y = (_rows(f, rng.choice(len(f), subset_size, replace=False)) for f in (real, generated))
        values.append(_mmd2(x, y))
    return float(np.mean(values)), float(np.std(values))


def _rows(features: Features, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    if isinstance(features, Tensor):
        picked: Tensor = features.detach()[torch.from_numpy(indices).to(features.device)]
        return picked.cpu().double().numpy()
    return features[indices].astype(np.float64)


def _mmd2(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Unbiased estimate of the squared discrepancy of two samples of n vectors each."""
    n = len(x)
    within = 0.0
    for z in (x, y):
        kernel = _kernel(z, z)
        within += float(kernel.sum() - kernel.trace())  # a vector beside itself would bias the estimate
    return within / (n * (n - 1)) - 2 * float(_kernel(x, y).mean())


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    base: NDArray[np.float64] = x @ y.T / x.shape[1] + 1
    return base * base * base
