"""All images of a source in one file, which every worker maps into its memory."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray

from cedm_ray.data.sieve import Sieve
from cedm_ray.data.sources import ImageSource, check_labels, check_range
from cedm_ray.errors import UserError

IMAGES, LABELS, SUPERCLASSES = "images.npy", "labels.npy", "superclasses.npy"
FACTS, SKIPPED = "facts.json", "skipped.txt"


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
    skipped: int
    """Bad images that were left out; they are listed in ``skipped.txt``."""
    num_superclasses: int | None
    class_names: tuple[str, ...] | None


@dataclass(frozen=True)
class PackedImages:
    """A packed source, itself an ``ImageSource``; ``images``, ``(N, C, R, R)`` uint8, is mapped read-only."""

    images: NDArray[np.uint8]
    class_labels: NDArray[np.int64] | None
    facts: PackFacts
    super_labels: NDArray[np.int64] | None = None

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

    def superclasses(self) -> tuple[NDArray[np.int64], int] | None:
        if self.super_labels is None or self.facts.num_superclasses is None:
            return None
        return self.super_labels.copy(), self.facts.num_superclasses

    def class_names(self) -> tuple[str, ...] | None:
        return self.facts.class_names

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        check_range(start, stop, len(self))
        return np.array(self.images[start:stop])


def pack(
    source: ImageSource, out: Path, *, block: int = 1024, on_bad_image: Literal["stop", "skip"] = "stop"
) -> Iterator[int]:
    """Write a source as ``images.npy``, ``labels.npy`` and ``superclasses.npy`` (if it has them) and ``facts.json``.

    Each file is written under another name and then renamed, and an old ``facts.json`` goes first, so that a folder
    with ``facts.json`` is whole. Memory stays at one block, and what grows with the number of images is their labels.

    Args:
        source: The images.
        out: Folder to write into; made if missing.
        block: Images that are read at once.
        on_bad_image: ``stop`` lets the source's error through; ``skip`` leaves out each image that raises a
            ``BadImageError``, with its labels, and lists it with the reason in ``skipped.txt``.

    Yields:
        Images of the source done so far, after each block; the folder is whole when the generator ends.

    Raises:
        UserError: If more than half of the images are bad.
        ValueError: If ``block`` is below 1 or the source is empty.
    """
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    n = len(source)
    if n == 0:
        raise ValueError(f"{source.name} holds no images; there is nothing to pack")
    out.mkdir(parents=True, exist_ok=True)
    (out / FACTS).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".packing-") as partial_name:
        partial = Path(partial_name)
        sieve, digest = Sieve(source, partial / SKIPPED), hashlib.sha256()
        read = source.read if on_bad_image == "stop" else sieve.read
        with (partial / IMAGES).open("wb") as images:
            _write_header(images, source, n)
            for start in range(0, n, block):
                stop = min(start + block, n)
                unchecked = read(start, stop)  # before the sieve is asked what it has kept of them
                pixels = _checked(source, unchecked, int(sieve.kept[start:stop].sum()))
                images.write(pixels.data)
                digest.update(pixels.data)
                yield stop
            images.seek(0)
            _write_header(images, source, int(sieve.kept.sum()))  # numpy pads headers: it is as long as the first
        _finish(source, partial, out, sieve.kept, digest.hexdigest())


def _shape(source: ImageSource) -> tuple[int, int, int]:
    return source.channels, source.resolution, source.resolution


def _write_header(file: IO[bytes], source: ImageSource, n: int) -> None:
    write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (n, *_shape(source))})


def _checked(source: ImageSource, pixels: NDArray[np.uint8], n: int) -> NDArray[np.uint8]:
    if pixels.shape != (n, *_shape(source)) or pixels.dtype != np.uint8:
        raise ValueError(f"read gave {pixels.dtype} {pixels.shape}; uint8 {(n, *_shape(source))} is due")
    return np.ascontiguousarray(pixels)


def _finish(source: ImageSource, partial: Path, out: Path, kept: NDArray[np.bool_], pixels_sha256: str) -> None:
    level = source.superclasses()
    for name, labels in ((LABELS, source.labels()), (SUPERCLASSES, None if level is None else level[0])):
        if labels is not None:
            np.save(partial / name, labels[kept].astype(np.int64), allow_pickle=False)
    facts = PackFacts(
        name=source.name,
        fingerprint=source.fingerprint,
        n=int(kept.sum()),
        resolution=source.resolution,
        channels=source.channels,
        num_classes=source.num_classes,
        pixels_sha256=pixels_sha256,
        skipped=int((~kept).sum()),
        num_superclasses=None if level is None else level[1],
        class_names=source.class_names(),
    )
    (partial / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n")
    for name in (LABELS, SUPERCLASSES, SKIPPED, IMAGES, FACTS):  # the facts last: with them the folder is whole
        if (partial / name).exists():
            os.replace(partial / name, out / name)
        else:
            (out / name).unlink(missing_ok=True)


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
        labels = _labels(folder / LABELS, facts.n, facts.num_classes)
        superclasses = _labels(folder / SUPERCLASSES, facts.n, facts.num_superclasses)
    except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} does not hold whole packed images ({error}); delete it and pack again") from error
    return PackedImages(images, labels, facts, superclasses)


def _labels(path: Path, n: int, num_classes: int | None) -> NDArray[np.int64] | None:
    if num_classes is None:
        return None
    labels: NDArray[np.int64] = np.load(path, allow_pickle=False)
    check_labels(labels, n, num_classes)
    return labels


def _facts(content: Any) -> PackFacts:
    names = {field.name for field in fields(PackFacts)}
    if not isinstance(content, dict) or set(content) != names:
        raise ValueError(f"{FACTS} does not hold exactly {', '.join(sorted(names))}")
    class_names = content.pop("class_names")
    if class_names is not None and len(class_names) != content["num_classes"]:
        raise ValueError(f"{FACTS} holds {len(class_names)} class names for {content['num_classes']} classes")
    return PackFacts(class_names=None if class_names is None else tuple(map(str, class_names)), **content)
