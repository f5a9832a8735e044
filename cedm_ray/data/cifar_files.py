"""The official CIFAR files: binary records, pickled batches, and the archives that hold them."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from cedm_ray.data.archives import MAX_MEMBER_BYTES, MAX_TAR_BYTES, tar_members
from cedm_ray.data.safe_pickle import read_pickled_dict, uint8_matrix
from cedm_ray.errors import UserError

RESOLUTION = 32
_PIXELS = 3 * RESOLUTION * RESOLUTION


@dataclass(frozen=True, eq=False)
class Batch:
    """What one file holds."""

    pixels: NDArray[np.uint8]
    """Shape ``(n, 3072)``: red, green, blue."""
    labels: NDArray[np.int64]
    """Shape ``(n,)``."""
    superclasses: NDArray[np.int64] | None
    """Coarse labels of CIFAR-100, shape ``(n,)``."""


@dataclass(frozen=True)
class CifarLayout:
    """How one split of one of the two datasets is spread over files, in the official order."""

    name: str
    class_names: tuple[str, ...]
    num_superclasses: int | None
    images_per_file: int
    binary_folder: str
    binary_archive: str
    binary_md5: str
    binary_files: tuple[str, ...]
    label_bytes: int  # bytes before the pixels of a binary record: the superclass where there is one, then the label
    python_folder: str
    python_archive: str
    python_files: tuple[str, ...]
    python_label_key: bytes
    python_superclass_key: bytes

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def read_file(path: Path) -> bytes:
    """All bytes of a file that is no larger than a CIFAR file can be.

    Raises:
        UserError: If it is missing, unreadable or too large.
    """
    try:
        size = path.stat().st_size
        if size > MAX_MEMBER_BYTES:
            raise UserError(f"{path} has {size} bytes, more than any CIFAR file; fetch it again")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); fetch the dataset again") from error


def read_archive(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The members with these base names, unpacked in memory; nothing is written to the disk.

    Raises:
        UserError: If the archive is damaged, too large, lacks a member or holds one that no archive should hold.
    """
    try:
        with gzip.open(path) as packed:
            unpacked = packed.read(MAX_TAR_BYTES + 1)
        if len(unpacked) > MAX_TAR_BYTES:
            raise UserError(f"{path} unpacks to more than {MAX_TAR_BYTES >> 20} MiB; fetch the official archive")
        found: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
            for member in tar_members(archive, path):
                name = PurePosixPath(member.name).name
                handle = archive.extractfile(member) if name in names else None
                if handle is not None:
                    if name in found:
                        raise UserError(f"{path} holds {name} twice; fetch the official archive")
                    found[name] = handle.read()
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path} is cut off or damaged ({error}); fetch it again") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; fetch the official archive")
    return found


def read_binary(layout: CifarLayout, data: bytes, where: str) -> Batch:
    """A binary file, whose records are label bytes, then red, green, blue.

    Raises:
        UserError: If its size or a label is wrong.
    """
    record = layout.label_bytes + _PIXELS
    if len(data) != layout.images_per_file * record:
        raise UserError(
            f"{where} has {len(data)} bytes; it must have {layout.images_per_file * record} "
            f"({layout.images_per_file} images): it is cut off or another file; fetch it again"
        )
    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, record)
    labels = _labels(rows[:, layout.label_bytes - 1].tolist(), layout.num_classes, where)
    superclasses = None
    if layout.num_superclasses is not None:
        superclasses = _labels(rows[:, 0].tolist(), layout.num_superclasses, where)
    return Batch(rows[:, layout.label_bytes :], labels, superclasses)


def read_python(layout: CifarLayout, data: bytes, where: str) -> Batch:
    """A pickled file, of which no code is run.

    Raises:
        UserError: If it is damaged or forged, or if a shape or a label is wrong.
    """
    content = read_pickled_dict(data, where)
    pixels = uint8_matrix(content.get(b"data"), where)
    if pixels.shape != (layout.images_per_file, _PIXELS):
        raise UserError(f"{where} holds images of shape {pixels.shape}; {(layout.images_per_file, _PIXELS)} is due")

    def level(key: bytes, num_classes: int) -> NDArray[np.int64]:
        raw = content.get(key)
        if not isinstance(raw, list) or len(raw) != len(pixels) or not all(type(v) is int for v in raw):
            raise UserError(f"{where} does not hold one whole-number label per image; fetch it again")
        return _labels(raw, num_classes, where)

    coarse = layout.num_superclasses
    return Batch(
        pixels,
        level(layout.python_label_key, layout.num_classes),
        None if coarse is None else level(layout.python_superclass_key, coarse),
    )


def _labels(values: Sequence[int], num_classes: int, where: str) -> NDArray[np.int64]:
    wrong = [value for value in values if not 0 <= value < num_classes]
    if wrong:
        raise UserError(f"{where} holds label {wrong[0]}; it must lie in [0, {num_classes}); fetch it again")
    return np.asarray(values, dtype=np.int64)
