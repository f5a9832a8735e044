"""Where training takes its batches from: any source that keeps to the order, and the one that holds all images."""

from collections.abc import Generator
from typing import Protocol

import torch
from torch import Tensor

from cedm_ray.diffusion.order import EpochOrder, epoch_parts

Batch = tuple[Tensor, Tensor | None]


class ImageSource(Protocol):
    """A set of images that gives the batches of a training, in the same order whatever the source."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, R, R)`` of an image."""

    @property
    def class_index(self) -> Tensor | None:
        """Cluster of each image, shape ``(N,)``, int64; None without a condition."""

    def __len__(self) -> int:
        """Images in the set, N."""

    def batches(self, seed: int, start: int, count: int, stride: int) -> Generator[Batch, None, None]:
        """Endless batches, on the device of the training; closing the generator frees what it holds.

        Args:
            seed: Seed of the run, which decides the order.
            start: Position of the first image in the row of :class:`EpochOrder`.
            count: Images of a batch.
            stride: Positions from one batch's first image to the next one's.

        Yields:
            The images at ``count`` positions from ``start + k * stride`` on, for k = 0, 1, ...: shape
            ``(count, C, R, R)``, uint8, and their clusters, shape ``(count,)``, int64, or None.
        """


class ResidentImages:
    """Images that all lie in memory, best in that of the training device, where they are picked without a wait.

    Args:
        images: Shape ``(N, C, R, R)``, uint8.
        class_index: Cluster of each image, shape ``(N,)``, int64, on the same device; None without a condition.

    Raises:
        ValueError: If the shapes, dtypes or devices are others, or there are no images.
    """

    def __init__(self, images: Tensor, class_index: Tensor | None) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
            raise ValueError(f"images have shape {tuple(images.shape)}, {images.dtype}; needed: (N, C, R, R), uint8")
        check_class_index(class_index, len(images))
        if class_index is not None and class_index.device != images.device:
            raise ValueError(f"class_index lies on {class_index.device}, the images on {images.device}")
        self._images, self._class_index = images, class_index

    def __len__(self) -> int:
        return len(self._images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self._images.shape[1:]
        return channels, height, width

    @property
    def class_index(self) -> Tensor | None:
        return self._class_index

    def batches(self, seed: int, start: int, count: int, stride: int) -> Generator[Batch, None, None]:
        order = _DeviceOrder(len(self), seed, self._images.device)
        while True:
            chosen = order.take(start, count)
            classes = None if self._class_index is None else self._class_index.index_select(0, chosen)
            yield self._images.index_select(0, chosen), classes
            start += stride


class _DeviceOrder:
    """The row of :class:`EpochOrder` on a device, to which each epoch is sent once, as a whole."""

    def __init__(self, num_images: int, seed: int, device: torch.device) -> None:
        self._order, self._device = EpochOrder(num_images, seed), device
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def take(self, start: int, count: int) -> Tensor:
        epochs = epoch_parts(start, count, self._order.num_images)
        parts = [self._shuffled(epoch)[places] for epoch, places in epochs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _shuffled(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            num_images = self._order.num_images
            permutation = self._order.take(epoch * num_images, num_images)
            if self._device.type == "cuda":
                permutation = permutation.pin_memory()  # so that the copy waits for nothing
            self._permutation, self._epoch = permutation.to(self._device, non_blocking=True), epoch
        return self._permutation


def check_class_index(class_index: Tensor | None, num_images: int) -> None:
    """Refuse clusters that do not go with so many images.

    Raises:
        ValueError: If shape or dtype are others than ``(num_images,)`` and int64.
    """
    if class_index is not None and (class_index.dtype != torch.int64 or class_index.shape != (num_images,)):
        raise ValueError(f"class_index has shape {tuple(class_index.shape)}, {class_index.dtype}; "
                         f"needed: ({num_images},), int64")  # fmt: skip
