"""What a detector is: images in, features out, and the facts that make two scores comparable."""

import re
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_PROPER_NAMES = {"inception": "fid", "dinov2": "fdd"}


class Detector(Protocol):
    """A fixed map from images to features.

    ``resize`` says how images are brought to the size that the detector wants ("none" if it takes them as they
    are); ``weights_hash`` is a digest of its weights. Both are stored beside every score.
    """

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def resize(self) -> str: ...
    @property
    def weights_hash(self) -> str: ...
    def __call__(self, images: Tensor, /) -> Tensor:
        """Features ``(B, D)`` float32 of images ``(B, C, H, W)`` uint8."""


def features_and_logits(detector: Detector, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features of images ``(B, C, H, W)`` uint8, and class scores where the detector has them."""
    both: Callable[[Tensor], tuple[Tensor, Tensor | None]] | None = getattr(detector, "features_and_logits", None)
    return (detector(images), None) if both is None else both(images)


def check_images(images: Tensor) -> None:
    """Refuse what is no batch of images.

    Raises:
        ValueError: Unless they are uint8, ``(B, 1 or 3, H, W)``.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; uint8, (B, 1 or 3, H, W) is due")


def metric_name(detector_name: str) -> str:
    """Name of the Fréchet distance on the features of a detector.

    Returns:
        ``fid`` for ``inception``, ``fdd`` for ``dinov2``, and ``fd_<name>`` in ``[a-z0-9_]`` for any other, so that
        no score passes for a published one.

    Raises:
        ValueError: If the name holds no letter or digit.
    """
    if detector_name in _PROPER_NAMES:
        return _PROPER_NAMES[detector_name]
    plain = re.sub(r"[^a-z0-9]+", "_", detector_name.lower()).strip("_")
    if not plain:
        raise ValueError(f"detector name is {detector_name!r}; it must hold a letter a-z or a digit")
    return f"fd_{plain}"


class FunctionDetector:
    """Any function from images to features as a ``Detector``.

    Args:
        name: Name of the detector, for example that of a backbone.
        dim: Feature dimensions D.
        fn: Maps uint8 ``(B, C, H, W)`` to floats ``(B, D)``.
        resize: How ``fn`` brings images to its size.
        weights_hash: Digest of its weights.
    """

    def __init__(self, name: str, dim: int, fn: Callable[[Tensor], Tensor], *, resize: str, weights_hash: str) -> None:
        metric_name(name)  # a name without a metric is refused here, not after the features are computed
        if dim < 1:
            raise ValueError(f"dim is {dim}; it must be at least 1")
        self.name, self.dim, self.resize, self.weights_hash = name, dim, resize, weights_hash
        self._fn = fn

    @torch.no_grad()
    def __call__(self, images: Tensor, /) -> Tensor:
        """Features ``(B, D)`` float32 of images ``(B, C, H, W)`` uint8.

        Raises:
            ValueError: If the images or the features are not of that kind.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; uint8, (B, C, H, W) is due")
        features = self._fn(images)
        if features.shape != (len(images), self.dim):
            raise ValueError(f"{self.name} gave features {tuple(features.shape)}; ({len(images)}, {self.dim}) is due")
        return features.to(torch.float32)
