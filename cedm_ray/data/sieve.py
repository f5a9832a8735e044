"""The sound images of a source, and an account of the bad ones."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cedm_ray.data.images import BadImageError, Outcome
from cedm_ray.data.sources import ImageSource
from cedm_ray.errors import UserError


def read_each(source: ImageSource, start: int, stop: int) -> Iterable[Outcome]:
    """Images ``start`` to ``stop - 1``, or what is wrong with them.

    A source with a method of this name is asked once; of any other a block with a bad image is read image by image.
    """
    each: Callable[[int, int], Iterable[Outcome]] | None = getattr(source, "read_each", None)
    if each is not None:
        return each(start, stop)
    try:
        return source.read(start, stop)
    except BadImageError:
        return [_read_one(source, i) for i in range(start, stop)]


def _read_one(source: ImageSource, i: int) -> Outcome:
    try:
        image: NDArray[np.uint8] = source.read(i, i + 1)[0]
        return image
    except BadImageError as error:
        return error


class Sieve:
    """Reads a source without its bad images, and keeps account of them.

    Args:
        source: The images.
        log: Text file to which a line is added for each image that is left out, with the reason.

    Attributes:
        kept: Which images are not known to be bad, shape ``(N,)``, bool.
    """

    def __init__(self, source: ImageSource, log: Path) -> None:
        self.kept = np.ones(len(source), dtype=bool)
        self._source, self._log, self._bad = source, log, 0

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The sound images among ``start`` to ``stop - 1``, shape ``(n, C, R, R)``, uint8.

        Raises:
            UserError: If more than half of the source's images have turned out to be bad.
        """
        side = self._source.resolution
        sound = np.empty((stop - start, self._source.channels, side, side), dtype=np.uint8)
        count = 0
        for i, outcome in zip(range(start, stop), read_each(self._source, start, stop), strict=True):
            if isinstance(outcome, BadImageError):
                self._leave_out(i, outcome)
            else:
                sound[count] = outcome
                count += 1
        return sound[:count]

    def _leave_out(self, index: int, error: BadImageError) -> None:
        self.kept[index] = False
        self._bad += 1
        with self._log.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"{error}\n")
        n = len(self._source)
        if 2 * self._bad > n:
            raise UserError(
                f"{self._bad} of the {n} images of {self._source.name} are bad, more than half of them: correct the "
                f"dataset; the last of them: {error}"
            )
