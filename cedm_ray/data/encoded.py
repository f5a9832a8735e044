"""Images that are decoded when they are read; most lie one by one, as files, objects or members of an archive."""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cedm_ray.data.classes import ClassLabels
from cedm_ray.data.images import BadImageError, Outcome, all_sound, decode, open_header, read_encoded
from cedm_ray.data.sources import check_range

_CHECK_BLOCK = 4096  # headers that wait for a thread at once


def default_threads() -> int:
    """Images to decode at once: one for each processor, but 8 at most, for full-size images take memory."""
    return min(8, os.cpu_count() or 1)


class DecodingSource(ABC):
    """What sources share whose images are decoded when ``read`` asks for them; a source says how a block is decoded.

    Args:
        name: Name of the dataset.
        fingerprint: Key of the images and their labels.
        resolution: Side of the images in pixels.
        channels: 3, or 1 for grey images.
        classes: Labels, if there are any.
    """

    def __init__(
        self, name: str, fingerprint: str, resolution: int, *, channels: int = 3, classes: ClassLabels | None = None
    ) -> None:
        self.name, self.fingerprint = name, fingerprint
        self.resolution, self.channels = resolution, channels
        self._classes = classes

    @property
    def num_classes(self) -> int | None:
        return None if self._classes is None else self._classes.num_classes

    @abstractmethod
    def __len__(self) -> int: ...

    def labels(self) -> NDArray[np.int64] | None:
        return None if self._classes is None else self._classes.labels.copy()

    def superclasses(self) -> tuple[NDArray[np.int64], int] | None:
        return None

    def class_names(self) -> tuple[str, ...] | None:
        return None if self._classes is None else self._classes.names

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return all_sound(self.read_each(start, stop), (self.channels, self.resolution, self.resolution))

    @abstractmethod
    def read_each(self, start: int, stop: int) -> list[Outcome]:
        """Images ``start`` to ``stop - 1``, or what is wrong with them."""


class EncodedSource(DecodingSource):
    """What sources of encoded images share; a source says what image number i is called and how it is opened.

    Only the list of names (and, where there are labels, of labels) grows with the number of images.

    Args:
        name: Name of the dataset.
        fingerprint: Key of the images and their labels.
        names: What each image is called inside the source, in the order of the images.
        resolution: Side of the images in pixels.
        channels: 3, or 1 for grey images.
        classes: Labels, if there are any.
        num_threads: Images that are read and decoded at once; ``default_threads()`` if None.
    """

    def __init__(
        self,
        name: str,
        fingerprint: str,
        names: Sequence[str],
        resolution: int,
        *,
        channels: int = 3,
        classes: ClassLabels | None = None,
        num_threads: int | None = None,
    ) -> None:
        super().__init__(name, fingerprint, resolution, channels=channels, classes=classes)
        self._names, self._num_threads = names, num_threads or default_threads()

    @abstractmethod
    def _where(self, name: str) -> str:
        """What the image is called in messages."""

    @abstractmethod
    def _open(self, name: str) -> IO[bytes]:
        """The encoded image, open for reading and seeking."""

    def _check(self, image: Image.Image, where: str) -> None:
        """Refuse an opened image for reasons that the source has beyond size and format; none by default."""

    def __len__(self) -> int:
        return len(self._names)

    def check(self) -> None:
        """Read the header of every image, so that a wrong one is found before hours are spent.

        Raises:
            BadImageError: Naming the first one that is no image, too small for the resolution, or too large to decode.
        """
        with ThreadPoolExecutor(self._num_threads) as pool:
            for start in range(0, len(self), _CHECK_BLOCK):
                for _ in pool.map(self._check_header, self._names[start : start + _CHECK_BLOCK]):
                    pass

    def read_each(self, start: int, stop: int) -> list[Outcome]:
        check_range(start, stop, len(self))
        with ThreadPoolExecutor(self._num_threads) as pool:
            return list(pool.map(self._outcome, self._names[start:stop]))

    def _outcome(self, name: str) -> Outcome:
        try:
            return self._decode(name)
        except BadImageError as error:
            return error

    def _check_header(self, name: str) -> None:
        where = self._where(name)
        with self._open(name) as file, open_header(file, where, self.resolution) as image:
            self._check(image, where)

    def _decode(self, name: str) -> NDArray[np.uint8]:
        where = self._where(name)
        with self._open(name) as file:
            data = read_encoded(file, where)
        with open_header(io.BytesIO(data), where, self.resolution) as image:
            self._check(image, where)
            return decode(image, where, self.resolution, self.channels)
