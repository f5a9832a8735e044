"""Models that turn images into embeddings: timm's by name, with weights from a file or from the network."""

import difflib
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cedm_ray.errors import UserError
from cedm_ray.features.pixels import PixelBackbone, PixelStats
from cedm_ray.features.transform import Transform
from cedm_ray.features.weights import check_weights, file_sha256, fill, read_state

# timm is imported where it is used: it takes seconds, and most processes of a search need no backbone.
PIXELS = "pixels"


class Backbone(Protocol):
    """A fixed map from images to embeddings."""

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def resize(self) -> str:
        """How images are brought to the model's size."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Embeddings ``(B, D)`` float32 of images ``(B, C, H, W)`` uint8."""


def check_backbone(name: str, weights: Path | None) -> str:
    """Refuse a backbone that cannot be there, without building it.

    Args:
        name: ``pixels`` or a timm name, with or without a pretrained tag.
        weights: File with the weights, or None.

    Returns:
        What identifies the weights: the SHA-256 of the file, else the name, which stands for timm's own weights.

    Raises:
        UserError: If the name is unknown, or the file is missing or no weight file.
    """
    if name == PIXELS:
        if weights is not None:
            raise UserError(f"backbone {PIXELS} has no weights; leave out --backbone-weights {weights}")
        return name
    import timm

    known = [*timm.list_models(), *timm.list_pretrained()]
    if name not in known:
        close = difflib.get_close_matches(name, [PIXELS, *known], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else f"; it must be {PIXELS} or a model of timm"
        raise UserError(f"backbone {name!r} is unknown{hint}")
    if weights is None:
        return name
    check_weights(weights)
    return file_sha256(weights)


def load_backbone(
    name: str, weights: Path | None, *, device: torch.device | str, pixel_stats: PixelStats | None = None
) -> Backbone:
    """A backbone, ready to use.

    Args:
        name: ``pixels`` or a timm name.
        weights: File with the weights: safetensors, or a .pt or .pth of tensors alone; None for timm's own.
        device: Where to compute.
        pixel_stats: Of the dataset; needed for ``pixels``.

    Raises:
        UserError: If the weights cannot be had or do not fit.
        ValueError: If ``pixels`` is asked for without statistics.
    """
    if name != PIXELS:
        return TimmBackbone(name, weights, device)
    if pixel_stats is None:
        raise ValueError("pixel_stats is None; the backbone pixels needs those of the dataset")
    return PixelBackbone(pixel_stats, device)


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone and the images it is for, small enough to travel to every process that loads it."""

    name: str
    weights: Path | None
    pixel_stats: PixelStats | None

    def load(self, device: torch.device | str) -> Backbone:
        """The backbone, as :func:`load_backbone` gives it."""
        return load_backbone(self.name, self.weights, device=device, pixel_stats=self.pixel_stats)


class TimmBackbone:
    """A timm model without its classifier, behind its own resize, crop and normalisation, all done on the device.

    Args:
        name: A timm name; with a pretrained tag (``vit_base_patch16_224.dino``) the transform is that tag's.
        weights: File with the weights; None for timm's own, from its cache or the network.
        device: Where to compute.
    """

    def __init__(self, name: str, weights: Path | None, device: torch.device | str) -> None:
        import timm

        self.name = name
        # A file is read before the model is built: what is wrong with it is known sooner.
        state = None if weights is None else read_state(weights)
        self._model = _pretrained(name) if state is None else timm.create_model(name, pretrained=False, num_classes=0)
        if state is not None:
            fill(self._model, state, classifiers=_classifiers(self._model), source=f"backbone weights {weights}")
        self._model.to(device).eval().requires_grad_(False)
        self.dim = _dim(self._model)
        self.transform = _transform(self._model)

    @property
    def resize(self) -> str:
        """How images are brought to the model's size."""
        t = self.transform
        return f"{t.interpolation}, antialiased, to {t.size[0]} px / {t.crop_share:g}, {t.crop_mode} crop"

    @torch.no_grad()
    def __call__(self, images: Tensor, /) -> Tensor:
        """Embeddings ``(B, D)`` float32 of images ``(B, 1 or 3, H, W)`` uint8."""
        features: Tensor = self._model(self.transform(images))
        return features.to(torch.float32)


def _dim(model: Any) -> int:
    # Some families (MobileNetV3) have a layer between the pooled features and the classifier.
    return int(getattr(model, "head_hidden_size", None) or model.num_features)


def _pretrained(name: str) -> Any:
    import timm

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # the error below says it in one line
    try:
        with _offline_unless_reachable():
            return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm and its hub raise whatever the network library raised
        raise UserError(
            f"the weights of backbone {name} cannot be fetched ({type(error).__name__}); "
            f"pass a file with them: --backbone-weights FILE"
        ) from error
    finally:
        logger.setLevel(level)


@contextmanager
def _offline_unless_reachable() -> Iterator[None]:
    """Look in the hub's cache alone where the hub does not answer: its own retries take a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _classifiers(model: Any) -> tuple[str, ...]:
    named = model.default_cfg.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _transform(model: Any) -> Transform:
    from timm.data import resolve_model_data_config

    data: dict[str, Any] = resolve_model_data_config(model)
    return Transform(
        size=(data["input_size"][1], data["input_size"][2]),
        interpolation="bicubic" if data["interpolation"] == "bicubic" else "bilinear",
        crop_share=float(data["crop_pct"]),
        crop_mode="squash" if data["crop_mode"] == "squash" else "center",
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )
