"""Embeddings at length 1, made a block of rows at a time from an array that may be larger than memory."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

BLOCK = 8192  # rows; large enough for products at full speed, small beside the embeddings of any large dataset


class UnitRows:
    """The rows of embeddings, each divided by its length when it is asked for; zero rows stay zero.

    Nothing is kept: the embeddings may be mapped from a file, read-only.

    Args:
        embeddings: Shape ``(N, D)``, float32.
    """

    def __init__(self, embeddings: NDArray[np.float32]) -> None:
        self._embeddings = embeddings
        self.dim = embeddings.shape[1]

    def __len__(self) -> int:
        return len(self._embeddings)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Some rows, shape ``(n, D)``, float32, contiguous.

        Raises:
            ValueError: If one of them is not finite.
        """
        picked = self._embeddings[rows]
        units = np.empty(picked.shape, dtype=np.float32)
        for start in range(0, len(picked), BLOCK):  # what is needed on the way is a block's, not all the rows'
            units[start : start + BLOCK] = _units(picked[start : start + BLOCK])
        return units

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows in order: the number of the first row of each block, and the block."""
        for start in range(0, len(self), BLOCK):
            yield start, self[start : start + BLOCK]


def _units(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    largest = np.abs(rows).max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise ValueError("embeddings hold NaN or infinity; look at the backbone and its weights")
    scaled = rows / np.where(largest > 0, largest, 1)  # first, so that no square over- or underflows
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.asarray(scaled / np.where(norms > 0, norms, 1), dtype=np.float32)


def mask_of_others(candidates: NDArray[np.int64], own: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the k + 1 candidates of each row are others: k of them.

    The row itself is left out, or the last candidate where duplicates of the row have pushed it out.

    Args:
        candidates: Rows found, shape ``(n, k + 1)``.
        own: The rows that they were found for, shape ``(n,)``.
    """
    itself = candidates == own[:, None]
    itself[~itself.any(axis=1), -1] = True
    kept: NDArray[np.bool_] = ~itself
    return kept
