"""All images of a source in one file, which every worker maps into its memory."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from cedm_ray.data.sources import ImageSource, check_labels, check_range
from cedm_ray.errors import UserError

IMAGES, LABELS, FACTS = "images.npy", "labels.npy", "facts.json"


@dataclass(frozen=True)
class PackFacts:
    """What stands in ``facts.json``."""

    name: str
    fingerprint: str
    n: int
    resolution: int
    channels: int
    num_classes: int | None
    pixels_sha256: str


@dataclass(frozen=True)
class PackedImages:
    """A packed source, itself an ``ImageSource``; ``images``, ``(N, C, R, R)`` uint8, is mapped read-only."""

    images: NDArray[np.uint8]
    class_labels: NDArray[np.int64] | None
    facts: PackFacts

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def fingerprint(self) -> str:
        return self.facts.fingerprint

    @property
    def resolution(self) -> int:
        return self.facts.resolution

    @property
    def channels(self) -> int:
        return self.facts.channels

    @property
    def num_classes(self) -> int | None:
        return self.facts.num_classes

    def __len__(self) -> int:
        return self.facts.n

    def labels(self) -> NDArray[np.int64] | None:
        return None if self.class_labels is None else self.class_labels.copy()

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        check_range(start, stop, len(self))
        return np.array(self.images[start:stop])


def pack(source: ImageSource, out: Path, *, block: int = 1024) -> Iterator[int]:
    """Write a source as ``images.npy``, ``labels.npy`` (if it has labels) and, last of all, ``facts.json``.

    Each file is written under another name and then renamed, and an old ``facts.json`` goes first, so that a folder
    with ``facts.json`` is whole. Memory stays at one block.

    Args:
        source: The images.
        out: Folder to write into; made if missing.
        block: Images that are read at once.

    Yields:
        Images done so far, after each block; the folder is whole when the generator ends.

    Raises:
        ValueError: If ``block`` is below 1 or the source is empty.
    """
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    n, shape = len(source), (source.channels, source.resolution, source.resolution)
    if n == 0:
        raise ValueError(f"{source.name} holds no images; there is nothing to pack")
    out.mkdir(parents=True, exist_ok=True)
    (out / FACTS).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".packing-") as partial_name:
        partial = Path(partial_name)
        images = open_memmap(partial / IMAGES, mode="w+", dtype=np.uint8, shape=(n, *shape))
        digest = hashlib.sha256()
        for start in range(0, n, block):
            stop = min(start + block, n)
            pixels = source.read(start, stop)
            if pixels.shape != (stop - start, *shape) or pixels.dtype != np.uint8:
                raise ValueError(f"read gave {pixels.dtype} {pixels.shape}; uint8 {(stop - start, *shape)} is due")
            images[start:stop] = pixels
            digest.update(np.ascontiguousarray(pixels).data)
            yield stop
        images.flush()
        del images
        _finish(source, partial, out, digest.hexdigest())


def _finish(source: ImageSource, partial: Path, out: Path, pixels_sha256: str) -> None:
    labels = source.labels()
    if labels is None:
        (out / LABELS).unlink(missing_ok=True)
    else:
        np.save(partial / LABELS, labels.astype(np.int64), allow_pickle=False)
        os.replace(partial / LABELS, out / LABELS)
    os.replace(partial / IMAGES, out / IMAGES)
    facts = PackFacts(
        name=source.name,
        fingerprint=source.fingerprint,
        n=len(source),
        resolution=source.resolution,
        channels=source.channels,
        num_classes=source.num_classes,
        pixels_sha256=pixels_sha256,
    )
    (partial / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n")
    os.replace(partial / FACTS, out / FACTS)


def load_packed(folder: Path) -> PackedImages:
    """Map a packed source into memory, after a look at sizes and dtypes (not at the pixels' hash).

    Raises:
        UserError: If the folder is not packed, or is torn: a file is missing, cut off or does not fit the facts.
    """
    try:
        facts = _facts(json.loads((folder / FACTS).read_text()))
        images = np.load(folder / IMAGES, mmap_mode="r", allow_pickle=False)
        expected = (facts.n, facts.channels, facts.resolution, facts.resolution)
        if images.shape != expected or images.dtype != np.uint8:
            raise ValueError(f"{IMAGES} is {images.dtype} {images.shape}; uint8 {expected} is due")
        labels = None
        if facts.num_classes is not None:
            labels = np.load(folder / LABELS, allow_pickle=False)
            check_labels(labels, facts.n, facts.num_classes)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} does not hold whole packed images ({error}); delete it and pack again") from error
    return PackedImages(images, labels, facts)


def _facts(content: Any) -> PackFacts:
    names = {field.name for field in fields(PackFacts)}
    if not isinstance(content, dict) or set(content) != names:
        raise ValueError(f"{FACTS} does not hold exactly {', '.join(sorted(names))}")
    return PackFacts(**content)
