"""How well features tell classes apart: the label of an image guessed from its neighbours."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cedm_ray.errors import require

_BLOCK = 8192


def knn_accuracy(neighbors: NDArray[np.integer[Any]], labels: NDArray[np.integer[Any]], k: int = 20) -> float:
    """Share of the images whose label is the most frequent one among their k nearest other images.

    Of labels that are equally frequent, the one whose nearest member comes first is taken.

    Args:
        neighbors: Nearest other images of each image, the nearest first, shape ``(N, K)``, integers in ``[0, N)``.
        labels: Class of each image, shape ``(N,)``, integers.
        k: Neighbours that vote, in ``[1, K]``.

    Returns:
        The accuracy in ``[0, 1]``.

    Raises:
        ValueError: If the arrays do not fit one another, k is out of bounds, or an image is its own neighbour.
    """
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.size == 0:
        raise ValueError(f"labels are {labels.shape} {labels.dtype}; they must be (N,), integers")
    if neighbors.ndim != 2 or len(neighbors) != len(labels) or not np.issubdtype(neighbors.dtype, np.integer):
        raise ValueError(f"neighbors are {neighbors.shape} {neighbors.dtype}; ({len(labels)}, K) integers are due")
    require(1 <= k <= neighbors.shape[1], "k", k, f"lie in [1, {neighbors.shape[1]}]")
    nearest = neighbors[:, :k]
    low, high = int(nearest.min()), int(nearest.max())
    if low < 0 or high >= len(labels):
        raise ValueError(f"neighbors reach from {low} to {high}; they must lie in [0, {len(labels)})")
    own = np.flatnonzero((nearest == np.arange(len(labels))[:, None]).any(axis=1))
    if own.size:
        raise ValueError(f"image {own[0]} is among its own neighbors; leave every image out of its own")
    right = 0
    for start in range(0, len(labels), _BLOCK):
        part = slice(start, start + _BLOCK)
        right += int(np.count_nonzero(_vote(labels[nearest[part]]) == labels[part]))
    return right / len(labels)


def _vote(votes: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Most frequent value of each row of ``(B, k)``, the first of them to appear in it."""
    counts = np.zeros(votes.shape, np.int64)
    for column in votes.T:
        counts += votes == column[:, None]
    first = counts.argmax(axis=1)  # the first of equal counts
    winners: NDArray[np.integer[Any]] = np.take_along_axis(votes, first[:, None], axis=1)[:, 0]
    return winners
