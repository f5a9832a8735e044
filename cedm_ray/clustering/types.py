"""What every way of grouping images hands on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cedm_ray.clustering.quality import cluster_probs as empirical_probs
from cedm_ray.clustering.quality import utilization_ratio


@dataclass(frozen=True, eq=False)
class Clustering:
    """Images in groups: what the diffusion model is conditioned on.

    The arrays may be read-only views of shared memory. A grouping that no head made (labels, a file) has no head losses
    and no best head, and a ``max_prob`` of 1 everywhere.

    Raises:
        ValueError: If the arrays contradict one another: lengths, ranges, ``cluster_probs`` that are not those of the
            assignments, a best head that does not exist.
    """

    num_clusters: int
    """Clusters that were available, C."""
    assignments: NDArray[np.int64]
    """Cluster of each image, shape ``(N,)``, int64 in ``[0, C)``."""
    cluster_probs: NDArray[np.float64]
    """Share of the images in each cluster, q(c), shape ``(C,)``, float64."""
    max_prob: NDArray[np.float32]
    """Probability that the chosen head gives to the assigned cluster, shape ``(N,)``, float32 in ``(0, 1]``."""
    head_losses: NDArray[np.float32]
    """Mean loss of each head over the last epoch, shape ``(H,)``, float32; empty without heads."""
    best_head: int | None
    """Index of the head that was used; None without heads."""

    def __post_init__(self) -> None:
        if self.cluster_probs.shape != (self.num_clusters,):  # before counting, which takes memory for every cluster
            raise ValueError(f"cluster_probs are {self.cluster_probs.shape}; they must be ({self.num_clusters},)")
        probs = empirical_probs(self.assignments, self.num_clusters)  # checks the assignments too
        if not np.allclose(self.cluster_probs, probs, rtol=0, atol=1e-9):
            raise ValueError("cluster_probs are not the shares of the assignments")
        if self.max_prob.shape != self.assignments.shape:
            raise ValueError(f"max_prob has {self.max_prob.size} values for {self.assignments.size} assignments")
        if not np.all((self.max_prob > 0) & (self.max_prob <= 1)):  # also refuses NaN
            raise ValueError("max_prob holds a value outside (0, 1]")
        if self.head_losses.ndim != 1 or not np.all(np.isfinite(self.head_losses)):
            raise ValueError("head_losses must be finite, one for each head")
        if self.best_head is None and self.head_losses.size:
            raise ValueError("best_head is None, but there are head losses")
        if self.best_head is not None and not 0 <= self.best_head < self.head_losses.size:
            raise ValueError(f"best_head is {self.best_head}; it must lie in [0, {self.head_losses.size})")

    @property
    def utilization_ratio(self) -> float:
        """Share of the available clusters that hold at least one image, r_C in ``(0, 1]``."""
        return utilization_ratio(self.assignments, self.num_clusters)


def make_clustering(
    assignments: NDArray[np.int64],
    num_clusters: int,
    *,
    max_prob: NDArray[np.float32] | None = None,
    head_losses: NDArray[np.float32] | None = None,
    best_head: int | None = None,
) -> Clustering:
    """Complete assignments to a :class:`Clustering`.

    Args:
        assignments: Cluster of each image, shape ``(N,)``, integers in ``[0, C)``.
        num_clusters: Clusters that were available, C.
        max_prob: Probability of the assigned cluster, shape ``(N,)``; 1 where it is not given.
        head_losses: Mean loss of each head, shape ``(H,)``; empty where it is not given.
        best_head: Index of the head behind the assignments.

    Returns:
        The clustering, with q(c) counted from the assignments.

    Raises:
        ValueError: If an assignment lies outside ``[0, C)`` or the arrays contradict one another.
    """
    probs = empirical_probs(assignments, num_clusters)
    return Clustering(
        num_clusters=num_clusters,
        assignments=np.ascontiguousarray(assignments, dtype=np.int64),
        cluster_probs=probs,
        max_prob=np.ones(len(assignments), np.float32) if max_prob is None else max_prob,
        head_losses=np.empty(0, np.float32) if head_losses is None else head_losses,
        best_head=best_head,
    )
