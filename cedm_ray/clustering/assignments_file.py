"""Groupings that the user brings along: the cluster of each image, from a file."""

import csv
import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cedm_ray.clustering.types import Clustering, make_clustering
from cedm_ray.errors import UserError

_BYTES_PER_IMAGE = 64  # int64 indices and clusters in decimal digits take no more
_BYTES_BESIDE = 2**20  # headers, and what else a small file holds
_COLUMNS = {"cluster", "assignment", "index"}

_Read = tuple[NDArray[Any], int | None]  # the array as it was found, and the number of clusters where the file has it


def read_assignments(path: Path, *, num_images: int, num_clusters: int | None = None) -> Clustering:
    """Read the cluster of each image from a file, and run nothing that is in it.

    ``.npy``: one array of any integer dtype. ``.pt``, ``.pth``: one tensor, or a mapping that holds exactly one.
    ``.safetensors``: a tensor ``assignments``, as :func:`~cedm_ray.clustering.clustering_io.save_clustering` writes it.
    ``.csv``: one column of whole numbers without a header; or with a header, a column ``cluster`` (or ``assignment``)
    and, where the rows are not in the order of the dataset, a column ``index`` with each image's place in it, from 0.

    Args:
        path: The file.
        num_images: Images of the dataset, N.
        num_clusters: Clusters C, which may exceed the largest cluster in the file where the last ones are empty; None
            for the number that a saved clustering states, and for the largest cluster + 1 in any other file.

    Returns:
        The clustering, without head losses, whose ``max_prob`` is 1.

    Raises:
        UserError: If the file cannot be read, is of another kind, is far too large, holds anything but N whole numbers
            in ``[0, C)``, or C exceeds N.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} ends in {path.suffix!r}; assignments are read from {', '.join(_READERS)}: convert it")
    _check_size(path, num_images)
    array, stated = reader(path)
    if array.dtype.kind not in "iu":
        raise UserError(f"{path} holds {array.dtype}; clusters must be whole numbers: store it with an integer dtype")
    if array.shape != (num_images,):
        raise UserError(
            f"{path} holds assignments of shape {array.shape}; the dataset has {num_images} images, so ({num_images},) "
            "is due: give one cluster for each image"
        )
    clusters = _checked_clusters(path, array, stated if num_clusters is None else num_clusters, num_images)
    return make_clustering(array.astype(np.int64), clusters)


def _check_size(path: Path, num_images: int) -> None:
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; it must be at least 1")
    if not path.is_file():
        raise UserError(f"{path} is no file; give one that holds the cluster of each image")
    most = _BYTES_BESIDE + _BYTES_PER_IMAGE * num_images
    size = path.stat().st_size
    if size <= most and zipfile.is_zipfile(path):  # what torch.save writes; its parts may be compressed
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(part.file_size for part in archive.infolist())
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise _unreadable(path, error) from error
    if size > most:
        raise UserError(
            f"{path} holds {size} bytes; for {num_images} images it may hold {most}: leave only the assignments in it"
        )


def _checked_clusters(path: Path, array: NDArray[Any], num_clusters: int | None, num_images: int) -> int:
    low, high = int(array.min()), int(array.max())
    if low < 0:
        at = int(array.argmin())
        raise UserError(f"{path} puts image {at} in cluster {low}; clusters are numbered from 0: renumber them")
    if num_clusters is None:
        if high >= num_images:
            raise UserError(
                f"{path} names cluster {high} for {num_images} images; there may be no more clusters than images: "
                "number them from 0 without gaps"
            )
        return high + 1
    if not 1 <= num_clusters <= num_images:
        raise UserError(
            f"{num_clusters} clusters are given for {path}; for {num_images} images they must lie in [1, {num_images}]"
        )
    if high >= num_clusters:
        raise UserError(
            f"{path} puts image {int(array.argmax())} in cluster {high}; with {num_clusters} clusters it must lie in "
            f"[0, {num_clusters}): give at least {high + 1} clusters, or none to have them counted"
        )
    return num_clusters


def _read_npy(path: Path) -> _Read:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header can claim any size
    except Exception as error:  # a damaged header can raise nearly anything
        raise _unreadable(path, error) from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an archive of arrays; store one array with numpy.save")
    return array, None


def _read_torch(path: Path) -> _Read:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = list(content.values()) if isinstance(content, Mapping) else [content]
        tensors = [value for value in tensors if isinstance(value, Tensor)]
        arrays = [value.detach().numpy() for value in tensors]
    except Exception as error:  # a damaged file can raise nearly anything
        raise _unreadable(path, error) from error
    if len(arrays) != 1:
        raise UserError(f"{path} holds {len(arrays)} tensors; it must hold one: store the assignments alone")
    return arrays[0], None


def _read_safetensors(path: Path) -> _Read:
    try:
        with safe_open(path, framework="numpy") as file:
            stated = (file.metadata() or {}).get("num_clusters")
            return file.get_tensor("assignments"), None if stated is None else int(stated)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error


def _read_csv(path: Path) -> _Read:
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error) from error
    while rows and not rows[-1]:  # blank lines at the end
        rows.pop()
    first = [cell.strip() for cell in rows[0]] if rows else []
    headed = any(_whole(cell) is None for cell in first)
    columns = _columns(path, first) if headed else {"cluster": 0}
    numbers = [_numbers(path, i + 1, row, len(columns)) for i, row in enumerate(rows) if i > 0 or not headed]
    table = np.array(numbers, np.int64).reshape(-1, len(columns))
    clusters = table[:, columns["cluster"]]
    if "index" in columns:
        clusters = clusters[_places(path, table[:, columns["index"]])]
    return clusters, None


def _columns(path: Path, header: list[str]) -> dict[str, int]:
    """Where the columns stand: ``cluster``, which may be called ``assignment``, and perhaps ``index``."""
    if not set(header) <= _COLUMNS or len(set(header) - {"index"}) != 1 or len(set(header)) != len(header):
        raise UserError(
            f"{path} begins with {','.join(header)[:80]!r}; a whole number is due, or a header of `cluster` (or "
            "`assignment`) and perhaps `index`: rename or remove what else is there"
        )
    return {"index" if name == "index" else "cluster": place for place, name in enumerate(header)}


def _numbers(path: Path, line: int, row: list[str], width: int) -> list[int]:
    if len(row) != width:
        raise UserError(
            f"{path} has {len(row)} values in row {line}; {width} due in each row: repair it, or give columns a header"
        )
    numbers = [_whole(cell) for cell in row]
    for cell, number in zip(row, numbers, strict=True):
        if number is None:
            raise UserError(f"{path} has {cell[:40]!r} in row {line}; only whole numbers are read: repair that row")
    return [number for number in numbers if number is not None]


def _whole(cell: str) -> int | None:
    """The whole number in a cell; None if it holds anything else, or more digits than int64 is sure to hold."""
    digits = cell.strip().removeprefix("-")
    return int(cell) if digits.isascii() and digits.isdigit() and len(digits) <= 18 else None


def _places(path: Path, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row of each image."""
    places = np.argsort(index, kind="stable")
    wrong = np.flatnonzero(index[places] != np.arange(len(index)))
    if wrong.size:
        raise UserError(
            f"{path} has {index[places[wrong[0]]]} in its column `index` where {wrong[0]} is due; the column must hold "
            f"each of 0 to {len(index) - 1} once: repair it"
        )
    return places


def _unreadable(path: Path, error: Exception) -> UserError:
    # Not the error's own words: numpy's and torch's advise to allow pickled objects, which would run code.
    return UserError(
        f"{path} is no {path.suffix.lower()} file of assignments ({type(error).__name__}): it is cut off, damaged, or "
        "holds other objects, which are not loaded; store it again as plain numbers"
    )


_READERS: dict[str, Callable[[Path], _Read]] = {
    ".npy": _read_npy,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".safetensors": _read_safetensors,
    ".csv": _read_csv,
}
