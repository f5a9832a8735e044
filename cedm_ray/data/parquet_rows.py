"""The rows of one column of some Parquet files, in order, a few at a time."""

import bisect
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from cedm_ray.errors import UserError, one_line

_ROWS = 64  # held at once
_BUFFER_BYTES = 4 * 2**20  # of a file, held at once
_FOOTER_THREADS = 16  # remote files answer slowly, but many at once
_TROUBLE = (pa.ArrowException, OSError, ValueError, NotImplementedError)


@dataclass(frozen=True)
class ParquetTable:
    """Parquet files that are read as one table, one after another.

    Of the files only the row counts of their row groups are kept.

    Args:
        filesystem: Where they are.
        files: Their paths there.
        prefix: Stands before a path in messages, for example ``s3://``.
    """

    filesystem: fs.FileSystem
    files: tuple[str, ...]
    prefix: str = ""

    def shown(self, file: int) -> str:
        return self.prefix + self.files[file]

    def open(self, file: int) -> pq.ParquetFile:
        """One of the files, its footer read, its columns to be read through a small buffer.

        Raises:
            UserError: If it cannot be read or is no Parquet.
        """
        try:
            handle = self.filesystem.open_input_file(self.files[file])
            return pq.ParquetFile(handle, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
        except _TROUBLE as error:
            raise trouble(self.shown(file), error) from error

    def schemas_and_groups(self) -> Iterator[tuple[pa.Schema, tuple[int, ...]]]:
        """Schema of each file and the rows in each of its row groups."""

        def footer(file: int) -> tuple[pa.Schema, tuple[int, ...]]:
            with self.open(file) as opened:
                meta = opened.metadata
                return opened.schema_arrow, tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups))

        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            yield from pool.map(footer, range(len(self.files)))

    def integers(self, column: str) -> NDArray[np.int64]:
        """A whole column of integers, shape ``(N,)``.

        Raises:
            UserError: If a file lacks it, or holds anything else in it.
        """
        parts = []
        for file in range(len(self.files)):
            with self.open(file) as opened:
                schema = opened.schema_arrow
                if column not in schema.names or not pa.types.is_integer(schema.field(column).type):
                    raise UserError(
                        f"{self.shown(file)} has no column {column!r} of whole numbers; leave --folder-labels out"
                    )
                try:
                    values = opened.read(columns=[column], use_threads=False).column(0).cast(pa.int64())
                except _TROUBLE as error:
                    raise trouble(self.shown(file), error) from error
            if values.null_count:
                raise UserError(f"{self.shown(file)} has rows without a {column}; give each a label, or none at all")
            parts.append(values.to_numpy())
        return np.concatenate(parts)


class RowReader:
    """Reads a column forwards; to go back, it starts again at the row group.

    So memory stays at some 64 rows, whatever the size of the row groups is.

    Args:
        table: The files.
        groups: Rows in each row group of each file.
        column: The column.
    """

    def __init__(self, table: ParquetTable, groups: Sequence[Sequence[int]], column: str) -> None:
        self._table, self._column = table, column
        self._places = [(file, group) for file, counts in enumerate(groups) for group in range(len(counts))]
        self._ends = np.cumsum([rows for counts in groups for rows in counts], dtype=np.int64).tolist()
        self._file_starts = np.cumsum([0] + [sum(counts) for counts in groups], dtype=np.int64).tolist()
        self._at, self._stream, self._batch = 0, self._batches(0), pa.array([], pa.null())

    def __len__(self) -> int:
        return int(self._file_starts[-1])

    def where(self, row: int) -> str:
        """What a row is called in messages."""
        file = bisect.bisect_right(self._file_starts, row) - 1
        return f"row {row - self._file_starts[file]} of {self._table.shown(file)}"

    def read(self, start: int, stop: int) -> Iterator[pa.Array]:
        """Rows ``start`` to ``stop - 1``, as arrays of some rows each.

        Raises:
            UserError: If a file is damaged or holds fewer rows than its footer says.
        """
        if start != self._at:
            self._at, self._stream, self._batch = start, self._batches(start), pa.array([], pa.null())
        while self._at < stop:
            if not len(self._batch):
                self._batch = next(self._stream, None)
                if self._batch is None:
                    raise UserError(f"{self.where(self._at)} is missing, against its footer; fetch the file again")
            part, self._batch = self._batch[: stop - self._at], self._batch[stop - self._at :]
            self._at += len(part)
            yield part

    def _batches(self, start: int) -> Iterator[pa.Array]:
        first = bisect.bisect_right(self._ends, start)
        skip = start - (self._ends[first - 1] if first else 0)
        for file, group in self._places[first:]:
            with self._table.open(file) as opened:
                batches = opened.iter_batches(_ROWS, row_groups=[group], columns=[self._column], use_threads=False)
                try:
                    for batch in batches:
                        column, skip = batch.column(0)[skip:], max(0, skip - len(batch))
                        if len(column):
                            yield column
                except _TROUBLE as error:
                    raise trouble(self._table.shown(file), error) from error


def trouble(where: str, error: Exception) -> UserError:
    """The one line for whatever the library says about a file."""
    return UserError(f"{where} cannot be read as Parquet ({one_line(error)}); repair or fetch it again")
