"""What every pile of images offers: a length, a content key, and blocks of uint8 pixels."""

import hashlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class ImageSource(Protocol):
    """A fixed, ordered pile of square images of one resolution.

    ``fingerprint`` changes whenever the pixels or the labels may have changed, so that whatever is computed from
    the images can be stored under it.
    """

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def resolution(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def num_classes(self) -> int | None: ...
    def __len__(self) -> int: ...
    def labels(self) -> NDArray[np.int64] | None:
        """Class of each image, shape ``(N,)``, int64 in ``[0, num_classes)``; None for unlabelled images."""

    def superclasses(self) -> tuple[NDArray[np.int64], int] | None:
        """A coarser class of each image, shape ``(N,)``, int64, and their number; None where there is no such level."""

    def class_names(self) -> tuple[str, ...] | None:
        """Name of each class, ``num_classes`` of them; None where they are not known."""

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Images ``start`` to ``stop - 1``, shape ``(stop - start, C, R, R)``, uint8.

        Raises:
            IndexError: Unless ``0 <= start <= stop <= N``.
        """


class ArraySource:
    """Images that are held in memory.

    Args:
        name: Name of the dataset.
        version: Enters the fingerprint; to be raised when the same files are read in another way.
        images: Shape ``(N, C, R, R)``, uint8.
        labels: Shape ``(N,)``, int64 in ``[0, num_classes)``, or None.
        num_classes: Number of classes, or None without labels.
        superclasses: Coarser labels, shape ``(N,)``, int64 in ``[0, S)``, and their number S.
        class_names: Name of each class.

    Raises:
        ValueError: If shapes, dtypes, labels or names are not as said above.
    """

    def __init__(
        self,
        name: str,
        version: str,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64] | None,
        num_classes: int | None,
        *,
        superclasses: tuple[NDArray[np.int64], int] | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        if images.ndim != 4 or images.shape[2] != images.shape[3] or images.dtype != np.uint8:
            raise ValueError(f"images are {images.dtype} of shape {images.shape}; they must be uint8, (N, C, R, R)")
        if (labels is None) != (num_classes is None):
            raise ValueError("labels and num_classes must be given together")
        if labels is not None and num_classes is not None:
            check_labels(labels, len(images), num_classes)
        if superclasses is not None:
            check_labels(superclasses[0], len(images), superclasses[1])
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"there are {len(class_names)} class names; {num_classes} are due")
        self.name = name
        self.num_classes = num_classes
        self.channels, self.resolution = int(images.shape[1]), int(images.shape[2])
        self._images, self._labels = images, labels
        self._superclasses, self._class_names = superclasses, class_names
        # The key is made of the pixels, not of the files, so that every edition of a dataset shares what is stored.
        digest = hashlib.sha256(f"{name} {version} {images.shape}".encode())
        digest.update(np.ascontiguousarray(images).data)
        for level in (labels, None if superclasses is None else superclasses[0]):
            digest.update(b"" if level is None else np.ascontiguousarray(level).tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def labels(self) -> NDArray[np.int64] | None:
        return None if self._labels is None else self._labels.copy()

    def superclasses(self) -> tuple[NDArray[np.int64], int] | None:
        return None if self._superclasses is None else (self._superclasses[0].copy(), self._superclasses[1])

    def class_names(self) -> tuple[str, ...] | None:
        return self._class_names

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        check_range(start, stop, len(self))
        return self._images[start:stop].copy()


def check_labels(labels: NDArray[np.int64], num_images: int, num_classes: int) -> None:
    """Refuse labels of the wrong shape or dtype, or outside ``[0, num_classes)``.

    Raises:
        ValueError: With the value and the bound.
    """
    if labels.shape != (num_images,) or labels.dtype != np.int64:
        raise ValueError(f"labels are {labels.dtype} of shape {labels.shape}; they must be int64, ({num_images},)")
    if num_images and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(f"labels span {labels.min()} to {labels.max()}; they must lie in [0, {num_classes})")


def check_range(start: int, stop: int, length: int) -> None:
    """Refuse a block of images that is not wholly there.

    Raises:
        IndexError: Unless ``0 <= start <= stop <= length``.
    """
    if not 0 <= start <= stop <= length:
        raise IndexError(f"images {start} to {stop} were asked for; the source holds 0 to {length}")
