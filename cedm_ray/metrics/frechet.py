"""The Fréchet distance between two Gaussians, and the streaming sums that it is made from."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cedm_ray.errors import UserError
from cedm_ray.metrics.trace_root import trace_of_root

Array = Tensor | NDArray[np.float64]


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Fréchet distance between two Gaussians, ``|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``.

    Args:
        mu1, mu2: Means, shape ``(D,)``; numpy or torch, taken to float64 on the device of ``sigma1``.
        sigma1, sigma2: Covariances, shape ``(D, D)``.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: If shapes do not match, a value is not finite, or a matrix is no covariance.

    Source: arXiv 1706.08500, Eq. 6.
    """
    device = sigma1.device if isinstance(sigma1, Tensor) else torch.device("cpu")
    m1, s1 = _gaussian(mu1, sigma1, device, "1")
    m2, s2 = _gaussian(mu2, sigma2, device, "2")
    if m1.shape != m2.shape:
        raise ValueError(f"mu1 has {len(m1)} dimensions and mu2 has {len(m2)}; they must have as many")
    distance = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * trace_of_root(s1, s2)
    return max(float(distance), 0.0)


def _gaussian(mu: Array, sigma: Array, device: torch.device, which: str) -> tuple[Tensor, Tensor]:
    m = torch.as_tensor(mu, dtype=torch.float64, device=device).detach()
    s = torch.as_tensor(sigma, dtype=torch.float64, device=device).detach()
    if m.ndim != 1 or s.shape != (len(m), len(m)) or len(m) == 0:
        raise ValueError(
            f"mu{which} has shape {tuple(m.shape)}, sigma{which} {tuple(s.shape)}; (D,) and (D, D) are due"
        )
    largest = s.abs().max()
    if not (m.isfinite().all() and largest.isfinite()):  # the largest is NaN where any value is
        raise ValueError(f"mu{which} or sigma{which} holds NaN or infinite values; look at the features")
    # As a rule it is symmetric to the last bit, which is seen in a fraction of the time of a comparison to a tolerance.
    if torch.equal(s, s.T):
        return m, s
    if not torch.allclose(s, s.T, rtol=1e-6, atol=1e-8 * float(largest)):
        raise ValueError(f"sigma{which} is not symmetric; it must be a covariance matrix")
    return m, (s + s.T) / 2


class FeatureSums:
    """Count, sum and outer products of features, in float64, from which mean and covariance follow.

    The sums of several workers add up: ``merge`` them, or all-reduce ``tensors()`` in place. Second moments lose about
    ``2 log10(mean / deviation)`` of their 16 digits.

    Args:
        dim: Feature dimensions D.
        device: Where the sums are kept.
    """

    def __init__(self, dim: int, *, device: torch.device | str = "cpu") -> None:
        if dim < 1:
            raise ValueError(f"dim is {dim}; it must be at least 1")
        self.dim = dim
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add the features of some images, shape ``(B, D)``, any float dtype.

        Raises:
            ValueError: If the shape is another or a value is not finite; nothing is added then.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features have shape {tuple(features.shape)}; (B, {self.dim}) is due")
        if not features.isfinite().all():
            raise ValueError("features hold NaN or infinite values; look at the images and at the detector")
        x = features.detach().to(self.sum)
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer.addmm_(x.T, x)  # no second matrix of D * D, which for a small batch takes longer than the product

    def merge(self, other: "FeatureSums") -> None:
        """Add the sums of another worker.

        Raises:
            ValueError: If its dimension is another.
        """
        if other.dim != self.dim:
            raise ValueError(f"sums of {other.dim} and {self.dim} dimensions cannot be merged")
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine += theirs.to(mine)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count (int64, scalar), sum ``(D,)`` and outer products ``(D, D)``: the state itself, not a copy."""
        return self.count, self.sum, self.outer

    @classmethod
    def from_tensors(cls, count: Tensor, total: Tensor, outer: Tensor) -> "FeatureSums":
        """The sums that ``tensors()`` came from, as copies.

        Raises:
            ValueError: If the shapes do not match.
        """
        if total.ndim != 1 or outer.shape != (len(total), len(total)) or count.numel() != 1:
            raise ValueError(f"sum has shape {tuple(total.shape)}, outer {tuple(outer.shape)}; (D,) and (D, D) are due")
        sums = cls(len(total), device=total.device)
        for mine, theirs in zip(sums.tensors(), (count.reshape(()), total, outer), strict=True):
            mine += theirs.to(mine)
        return sums

    def mean_cov(self) -> tuple[Tensor, Tensor]:
        """Mean ``(D,)`` and covariance ``(D, D)`` with N - 1, float64.

        Raises:
            UserError: If there are fewer images than dimensions, so that the covariance would be short of ranks.
        """
        n = int(self.count)
        if n < max(self.dim, 2):
            raise UserError(
                f"{n} images are too few for features of {self.dim} dimensions; "
                f"at least {max(self.dim, 2)} are needed: score more images or use a detector with fewer dimensions"
            )
        mean = self.sum / n
        cov = (self.outer - torch.outer(self.sum, mean)) / (n - 1)
        return mean, (cov + cov.T) / 2
