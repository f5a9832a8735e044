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

from cedm_ray.data.safe_pickle import read_pickled_dict, uint8_matrix
from cedm_ray.errors import UserError

RESOLUTION = 32
_PIXELS = 3 * RESOLUTION * RESOLUTION
_MAX_ARCHIVE_BYTES = 512 * 2**20  # unpacked; the largest official archive has 187 MB
_MAX_FILE_BYTES = 256 * 2**20  # the largest official file has 155 MB

Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]


@dataclass(frozen=True)
class CifarLayout:
    """How one of the two datasets is spread over files, in the official order."""

    name: str
    num_classes: int
    images_per_file: int
    binary_folder: str
    binary_archive: str
    binary_md5: str
    binary_files: tuple[str, ...]
    label_bytes: int  # bytes before the pixels of a binary record; the last of them is the label
    python_folder: str
    python_archive: str
    python_files: tuple[str, ...]
    python_label_key: bytes


def read_file(path: Path) -> bytes:
    """All bytes of a file that is no larger than a CIFAR file can be.

    Raises:
        UserError: If it is missing, unreadable or too large.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise UserError(f"{path} has {size} bytes, more than any CIFAR file; fetch it again")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); fetch the dataset again") from error


def read_archive(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The members with these base names, unpacked in memory; nothing is written to the disk.

    Raises:
        UserError: If the archive is damaged, too large, lacks a member or holds one twice.
    """
    try:
        with gzip.open(path) as packed:
            unpacked = packed.read(_MAX_ARCHIVE_BYTES + 1)
        if len(unpacked) > _MAX_ARCHIVE_BYTES:
            raise UserError(f"{path} unpacks to more than {_MAX_ARCHIVE_BYTES >> 20} MiB; fetch the official archive")
        found: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                handle = archive.extractfile(member) if member.isreg() and name in names else None
                if handle is not None:
                    if name in found:
                        raise UserError(f"{path} holds {name} twice; fetch the official archive")
                    found[name] = handle.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path} is cut off or damaged ({error}); fetch it again") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; fetch the official archive")
    return found


def read_binary(layout: CifarLayout, data: bytes, where: str) -> Batch:
    """Pixels ``(n, 3072)`` uint8 and labels ``(n,)`` int64 of a binary file: label bytes, then red, green, blue.

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
    return rows[:, layout.label_bytes :], _labels(layout, rows[:, layout.label_bytes - 1].tolist(), where)


def read_python(layout: CifarLayout, data: bytes, where: str) -> Batch:
    """Pixels ``(n, 3072)`` uint8 and labels ``(n,)`` int64 of a pickled file, of which no code is run.

    Raises:
        UserError: If it is damaged or forged, or if a shape or a label is wrong.
    """
    content = read_pickled_dict(data, where)
    pixels = uint8_matrix(content.get(b"data"), where)
    if pixels.shape != (layout.images_per_file, _PIXELS):
        raise UserError(f"{where} holds images of shape {pixels.shape}; {(layout.images_per_file, _PIXELS)} is due")
    raw = content.get(layout.python_label_key)
    if not isinstance(raw, list) or len(raw) != len(pixels) or not all(type(v) is int for v in raw):
        raise UserError(f"{where} does not hold one whole-number label per image; fetch it again")
    return pixels, _labels(layout, raw, where)


def _labels(layout: CifarLayout, values: Sequence[int], where: str) -> NDArray[np.int64]:
    wrong = [value for value in values if not 0 <= value < layout.num_classes]
    if wrong:
        raise UserError(f"{where} holds label {wrong[0]}; it must lie in [0, {layout.num_classes}); fetch it again")
    return np.asarray(values, dtype=np.int64)
