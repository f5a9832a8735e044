"""The order in which training sees the images."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cedm_ray.diffusion.streams import Purpose, numpy_stream


class EpochOrder:
    """An endless row of images: one shuffled pass over the set after another, none left out, none repeated.

    The image at a position of the row depends on ``(seed, position)`` alone. Processes take disjoint slices of
    the row, so the images of a step are the same for any number of processes, and a run that is cut off goes on
    where it was.

    Args:
        num_images: Images in the set, N.
        seed: Seed of the run; the permutation of an epoch is drawn from ``(seed, epoch)``.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def take(self, start: int, count: int) -> Tensor:
        """Images at positions ``start`` to ``start + count - 1``, shape ``(count,)``, int64 in ``[0, N)``."""
        parts = [self._shuffled(epoch)[places] for epoch, places in epoch_parts(start, count, self.num_images)]
        return torch.from_numpy(np.concatenate(parts))

    def _shuffled(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if epoch != self._epoch:  # only the current epoch is kept: the row is read forward
            self._permutation = numpy_stream(self.seed, Purpose.ORDER, epoch).permutation(self.num_images)
            self._epoch = epoch
        return self._permutation


def epoch_parts(start: int, count: int, num_images: int) -> Iterator[tuple[int, slice]]:
    """The epochs that positions ``start`` to ``start + count - 1`` fall into, each with the places within it."""
    end = start + count
    while start < end:
        epoch, first = divmod(start, num_images)
        stop = min(first + end - start, num_images)
        yield epoch, slice(first, stop)
        start += stop - first
