"""Generated images side by side: of every number of clusters from the same noise, and by their confidence."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cedm_ray.report.image_rows import ImageRow, check_images, labelled_rows
from cedm_ray.report.rows import metric_title

_COLUMNS, _CONFIDENCE_COLUMNS = 12, 16


def read_samples(file: Path) -> NDArray[np.uint8]:
    """Generated images from a file, shape ``(n, C, H, W)``.

    Raises:
        ValueError: If it holds something else.
        OSError: If it cannot be read.
    """
    images: NDArray[np.uint8] | None = _arrays(file).get("")
    if images is None:
        raise ValueError("it holds no single array")
    check_images(images)
    return images


def _arrays(file: Path) -> dict[str, Any]:
    """The arrays of an .npz by their names, or the one of an .npy without a name."""
    try:
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"": found}
        with found:
            return {name: found[name] for name in found.files}
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError("it is cut off") from error


def samples_picture(labels: Sequence[str], samples: Sequence[NDArray[np.uint8]], *, metric: str) -> Image.Image:
    """The first samples of several models, one row for each; a column has one noise.

    Args:
        labels: One for each model.
        samples: Shape ``(n, C, H, W)`` each, uint8, in the order of the noise.
        metric: Name of the score in the labels.

    Source: arXiv 2403.00570, Fig. 4.
    """
    rows = [ImageRow(label, images[:_COLUMNS]) for label, images in zip(labels, samples, strict=True)]
    header = f"Samples of each model, with kimg and {metric_title(metric)}; a column starts from the same noise"
    return labelled_rows(rows, header)


@dataclass(frozen=True)
class Confidence:
    """Samples by how sure the clustering is of their cluster."""

    high: NDArray[np.uint8]
    """The most certain ones, shape ``(n, C, H, W)``."""
    high_probs: NDArray[np.float64]
    """Highest cluster probability of each, shape ``(n,)``."""
    low: NDArray[np.uint8]
    low_probs: NDArray[np.float64]
    unconditional: NDArray[np.uint8] | None = None
    """What the unconditional model makes from the noise of ``high``."""


def read_confidence(file: Path) -> Confidence:
    """The samples of a ``confidence.npz``.

    Raises:
        ValueError: If an array is missing or is not of its kind.
        OSError: If the file cannot be read.
    """
    found = _arrays(file)
    missing = [name for name in ("high", "high_probs", "low", "low_probs") if name not in found]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    names = ("high", "high_probs", "low", "low_probs", "unconditional")
    return Confidence(**{name: found[name] for name in names if name in found})


def confidence_picture(confidence: Confidence) -> Image.Image:
    """The most and the least certain samples with their probabilities, beside unconditional ones.

    Raises:
        ValueError: If arrays do not fit one another.

    Source: arXiv 2403.00570, Figs. 7 and 10.
    """
    rows = _block("highest confidence", confidence.high, confidence.high_probs)
    if confidence.unconditional is not None:
        rows += _block("unconditional,\nthe same noise", confidence.unconditional, None)
    rows += _block("lowest confidence", confidence.low, confidence.low_probs)
    return labelled_rows(rows, "Samples with the probability of their likeliest cluster")


def _block(label: str, images: NDArray[np.uint8], probs: NDArray[np.float64] | None) -> list[ImageRow]:
    if probs is not None and probs.shape != images.shape[:1]:
        raise ValueError(f"there are {probs.size} probabilities for {len(images)} images")
    captions = () if probs is None else tuple(f"{prob:.3f}" for prob in probs)
    width = _CONFIDENCE_COLUMNS
    return [
        ImageRow("" if first else label, images[first : first + width], captions[first : first + width])
        for first in range(0, max(len(images), 1), width)
    ]
