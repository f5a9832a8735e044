"""The first images of a source, for trying things out."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cedm_ray.data.images import Outcome
from cedm_ray.data.sieve import read_each
from cedm_ray.data.sources import ImageSource, check_range
from cedm_ray.errors import UserError


@dataclass(frozen=True)
class FirstImages:
    """The first ``count`` images of another source, in its order.

    Raises:
        UserError: If the source holds fewer.
    """

    source: ImageSource
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= len(self.source):
            raise UserError(
                f"max_images is {self.count}; {self.source.name} has {len(self.source)} images, "
                f"so it must lie in [1, {len(self.source)}]"
            )

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}[:{self.count}]"

    @property
    def resolution(self) -> int:
        return self.source.resolution

    @property
    def channels(self) -> int:
        return self.source.channels

    @property
    def num_classes(self) -> int | None:
        return self.source.num_classes

    def __len__(self) -> int:
        return self.count

    def labels(self) -> NDArray[np.int64] | None:
        labels = self.source.labels()
        return None if labels is None else labels[: self.count]

    def superclasses(self) -> tuple[NDArray[np.int64], int] | None:
        level = self.source.superclasses()
        return None if level is None else (level[0][: self.count], level[1])

    def class_names(self) -> tuple[str, ...] | None:
        return self.source.class_names()

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        check_range(start, stop, self.count)
        return self.source.read(start, stop)

    def read_each(self, start: int, stop: int) -> Iterable[Outcome]:
        """Images ``start`` to ``stop - 1``, or what is wrong with them."""
        check_range(start, stop, self.count)
        return read_each(self.source, start, stop)
