"""How well a clustering uses the clusters it was given."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Assignments = Tensor | NDArray[Any]
"""Cluster of each image, shape ``(N,)``, any integer dtype."""

_SUM_TOLERANCE = 1e-6  # lets shares pass that were once float32


def utilization_ratio(assignments: Assignments, num_clusters: int) -> float:
    """Share of the available clusters that hold at least one image, r_C = C_u / C.

    Args:
        assignments: Cluster of each image, shape ``(N,)``, integers in ``[0, C)``.
        num_clusters: Clusters that the head could have used, C.

    Returns:
        r_C in ``(0, 1]``.

    Raises:
        ValueError: If there is no assignment, C is below 1, or an assignment lies outside ``[0, C)``.

    Source: arXiv 2403.00570, Sec. 3.3.
    """
    return num_used(assignments, num_clusters) / num_clusters


def num_used(assignments: Assignments, num_clusters: int) -> int:
    """Number of clusters that hold at least one image, C_u.

    Args:
        assignments: Cluster of each image, shape ``(N,)``, integers in ``[0, C)``.
        num_clusters: Clusters that the head could have used, C.

    Returns:
        C_u in ``[1, C]``.

    Raises:
        ValueError: If there is no assignment, C is below 1, or an assignment lies outside ``[0, C)``.
    """
    return int(np.count_nonzero(_counts(assignments, num_clusters)))


def cluster_probs(assignments: Assignments, num_clusters: int) -> NDArray[np.float64]:
    """Share of the images in each cluster, q(c), from which the conditions of sampled images are drawn.

    Args:
        assignments: Cluster of each image, shape ``(N,)``, integers in ``[0, C)``.
        num_clusters: Clusters that the head could have used, C.

    Returns:
        q(c), shape ``(C,)``, float64, sums to 1; 0 for an empty cluster.

    Raises:
        ValueError: If there is no assignment, C is below 1, or an assignment lies outside ``[0, C)``.

    Source: arXiv 2403.00570, Sec. 3.
    """
    counts = _counts(assignments, num_clusters)
    probs: NDArray[np.float64] = counts / counts.sum()
    return probs


def kl_from_uniform(cluster_probs: NDArray[np.floating[Any]]) -> float:
    """Kullback-Leibler divergence of q(c) from the uniform distribution, ``sum_c q(c) log(q(c) C)``.

    Args:
        cluster_probs: Share of the images in each cluster, q(c), shape ``(C,)``; an empty cluster adds nothing.

    Returns:
        The divergence in nats, in ``[0, log C]``: 0 for clusters of one size, log C for a single used cluster.

    Raises:
        ValueError: If q is not of shape ``(C,)``, holds a value that is negative or not finite, or does not sum to 1.

    Source: arXiv 2403.00570.
    """
    probs = np.asarray(cluster_probs, dtype=np.float64)
    if probs.ndim != 1 or probs.size == 0:
        raise ValueError(f"cluster_probs have shape {probs.shape}; they must be (C,)")
    if not np.all((probs >= 0) & (probs <= 1 + _SUM_TOLERANCE)):  # also refuses NaN
        raise ValueError("cluster_probs hold a value outside [0, 1]")
    if abs(probs.sum() - 1) > _SUM_TOLERANCE:
        raise ValueError(f"cluster_probs sum to {probs.sum():.6g}; they must sum to 1")
    held = probs[probs > 0]
    return max(float(np.sum(held * np.log(held * probs.size))), 0.0)


def as_array(values: Assignments) -> NDArray[Any]:
    """The values on the CPU, whatever held them; not copied where they are an array or a tensor there."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def integer_array(values: Assignments, name: str) -> NDArray[Any]:
    """One integer for each image, shape ``(N,)``.

    Args:
        values: Assignments or labels.
        name: What a message calls them.

    Raises:
        ValueError: If they are anything else, or none.
    """
    array = as_array(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} are {array.shape} {array.dtype}; they must be (N,), integers")
    if array.size == 0:
        raise ValueError(f"{name} are empty; at least one image is needed")
    return array


def _counts(assignments: Assignments, num_clusters: int) -> NDArray[np.int64]:
    """Images per cluster, shape ``(C,)``."""
    if num_clusters < 1:
        raise ValueError(f"num_clusters is {num_clusters}; it must be at least 1")
    values = integer_array(assignments, "assignments")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= num_clusters:
        raise ValueError(f"assignments reach from {low} to {high}; they must lie in [0, {num_clusters})")
    return np.bincount(values.astype(np.int64, copy=False), minlength=num_clusters)
