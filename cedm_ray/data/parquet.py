"""Images in a column of Parquet files, local or remote."""

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pyarrow import fs

from cedm_ray.data.classes import numbered_classes
from cedm_ray.data.encoded import DecodingSource, default_threads
from cedm_ray.data.images import (
    MAX_FILE_BYTES,
    WAY_OUT,
    BadImageError,
    Outcome,
    check_size,
    checked_resolution,
    decode,
    decode_bytes,
)
from cedm_ray.data.parquet_column import LABEL_COLUMN, PixelsOrBytes, check_column, class_names_in, image_values
from cedm_ray.data.parquet_names import files_in, is_parquet
from cedm_ray.data.parquet_rows import ParquetTable, RowReader
from cedm_ray.data.sources import check_range
from cedm_ray.errors import UserError

_VERSION = "1"  # to be raised when the same files become other pixels


class ParquetSource(DecodingSource):
    """The images in a column of one or more Parquet files, in the order of the files and of their rows.

    A value is an encoded image (PNG, JPEG, WebP), a struct whose field ``bytes`` is one (as Hugging Face writes them),
    or a uint8 tensor of Arrow's fixed shape, (H, W), (H, W, 3), (H, W, 1), (3, H, W) or (1, H, W). ``images.decode``
    says what becomes of each; all become RGB.

    Rows are decoded as they are read, some 64 at a time. What grows with the number of images is their labels; of the
    files the row counts of their row groups are kept. The images are looked at when they are read, not before, for a
    column is read from its start.

    Args:
        files: The files, in order.
        filesystem: Where they are.
        resolution: Side of the images in pixels, 8 to 256 and divisible by 4.
        image_column: Column of the images.
        label_column: Whether the column ``label``, of whole numbers, holds their classes; the classes have names where
            Hugging Face's own metadata give them.
        name: Name of the dataset.
        prefix: Stands before a path in messages, for example ``s3://``.

    Raises:
        UserError: If a file is no Parquet, a column is missing or of another kind, there is no row, or the resolution
            is missing or out of bounds.
    """

    def __init__(
        self,
        files: Sequence[fs.FileInfo],
        filesystem: fs.FileSystem,
        resolution: int | None,
        *,
        image_column: str = "image",
        label_column: bool = False,
        name: str = "parquet",
        prefix: str = "",
    ) -> None:
        resolution = checked_resolution(resolution, "a Parquet dataset")
        table = ParquetTable(filesystem, tuple(file.path for file in files), prefix)
        groups, names = [], None
        for i, (schema, counts) in enumerate(table.schemas_and_groups()):
            check_column(schema, image_column, table.shown(i))
            names = class_names_in(schema) if i == 0 else names
            groups.append(counts)
        self._rows, self._lock = RowReader(table, groups, image_column), threading.Lock()
        if not len(self._rows):
            raise UserError(f"{table.shown(0)} holds no rows; give files with images")
        classes = numbered_classes(table.integers(LABEL_COLUMN), table.shown(0), names) if label_column else None
        digest = hashlib.sha256(f"parquet {_VERSION} {resolution} {label_column} {image_column}\n".encode())
        for file in files:  # as for a folder, sizes and times stand for the contents
            digest.update(f"{file.base_name}\0{file.size} {file.mtime_ns}\n".encode(errors="surrogateescape"))
        super().__init__(name, digest.hexdigest(), resolution, classes=classes)

    def __len__(self) -> int:
        return len(self._rows)

    def read_each(self, start: int, stop: int) -> list[Outcome]:
        check_range(start, stop, len(self))
        outcomes: list[Outcome] = []
        with self._lock, ThreadPoolExecutor(default_threads()) as pool:
            for column in self._rows.read(start, stop):
                first = start + len(outcomes)
                outcomes += pool.map(self._outcome, image_values(column), range(first, first + len(column)))
        return outcomes

    def _outcome(self, value: PixelsOrBytes, row: int) -> Outcome:
        try:
            return self._decode(value, self._rows.where(row))
        except BadImageError as error:
            return error

    def _decode(self, value: PixelsOrBytes, where: str) -> NDArray[np.uint8]:
        if value is None:
            raise BadImageError(f"{where} holds no image but null; remove that row, {WAY_OUT}")
        if isinstance(value, np.ndarray):
            check_size(value.shape[1], value.shape[0], where, self.resolution)
            return decode(Image.fromarray(value), where, self.resolution)
        if len(value) > MAX_FILE_BYTES:
            raise BadImageError(f"{where} is too large: it has over {MAX_FILE_BYTES >> 20} MiB; remove it, {WAY_OUT}")
        return decode_bytes(value, where, self.resolution)


def open_local_parquet(
    path: Path, resolution: int | None, *, image_column: str = "image", label_column: bool = False
) -> ParquetSource:
    """A Parquet file, or the ``*.parquet`` files directly in a folder, sorted by name, without hidden ones.

    All files of a folder make one dataset: where it holds several splits, give the file of one, or a folder for each.

    Raises:
        UserError: As ``ParquetSource`` does.
    """
    local = fs.LocalFileSystem()
    files = [path / name for name in files_in(path) if is_parquet(name)] if path.is_dir() else [path]
    name = path.resolve().name if path.is_dir() else path.stem  # a link to a file may lead to a name of digits
    infos = local.get_file_info([str(file) for file in files])
    return ParquetSource(infos, local, resolution, image_column=image_column, label_column=label_column, name=name)
