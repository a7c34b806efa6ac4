"""Reads images inside of Parquet files (see pipeline.data.source.cells)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as t

from pipeline.data.source.columns import Flaw
from pipeline.data.source.parsers.child import Budget
from pipeline.errors import UserError
from pipeline.local import CELL

BATCH_ROWS, BATCH_BYTES = 64, 16 << 20  # of images at once, about
PEEKED = 16  # rows by which it is judged whether a column of bytes holds images
BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")  # of JPEG, PNG, GIF, WebP, TIFF


def cell_references(path: Path, column: str, metadata: pq.FileMetaData) -> Iterator[str]:
    """Yields a reference for each row of a file."""
    for group in range(metadata.num_row_groups):
        place = f"{CELL}{quote(os.fsencode(path))}?column={quote(column, safe='')}&group={group}"
        place += f"&size={_size(metadata, group, column)}&row="
        yield from (f"{place}{row}" for row in range(metadata.row_group(group).num_rows))


def holds_images(file: pq.ParquetFile, column: str) -> bool:
    """Returns whether a column holds images: structs with bytes, or bytes that begin as images do."""
    kind = file.schema_arrow.field(column).type
    if t.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    plain = kind.value_type if t.is_dictionary(kind) else kind
    if not (t.is_binary(plain) or t.is_large_binary(plain)):
        return False
    batch = next(file.iter_batches(PEEKED, columns=[column], use_threads=False), None)
    first = next(filter(None, batch[0].to_pylist()), b"") if batch else b""
    return bool(first.startswith(BEGINNINGS) or first[4:8] == b"ftyp")


def cells(
    opened: BinaryIO, path: Path, budget: Budget, column: str, places: Sequence[tuple[int, int, int]], most: int
) -> Iterator[bytes | Flaw]:
    """Yields the image of each place: row group, its size and the row; fastest where they rise."""
    try:
        with pq.ParquetFile(opened, buffer_size=1 << 20) as file:
            reader = _Groups(file, column)
            for group, size, row in places:
                data = reader.value(group, size, row)
                if data is None:
                    yield Flaw("missing_file", "")
                else:
                    yield data if len(data) <= most else Flaw("too_large", "")
    except MemoryError:  # Arrow's is an ArrowException, too
        raise
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"source {path}: images in it cannot be read ({(str(e) or repr(e)).splitlines()[0]})") from None


class _Groups:
    """Reads the values of a column, few at once."""

    def __init__(self, file: pq.ParquetFile, column: str):
        self._file, self._column, self._metadata = file, column, file.metadata
        kind = file.schema_arrow.field(column).type if column in file.schema_arrow.names else pa.null()
        self._leaf = f"{column}.bytes" if t.is_struct(kind) else column
        self._group, self._start = -1, 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._values: pa.Array = pa.nulls(0)

    def value(self, group: int, size: int, row: int) -> bytes | None:
        """Returns the bytes in a row; None where there are none, or the file was replaced."""
        if group >= self._metadata.num_row_groups or _size(self._metadata, group, self._column) != size:
            return None
        if row >= self._metadata.row_group(group).num_rows:
            return None
        if group != self._group or row < self._start:
            self._open(group)
        while row >= self._start + len(self._values):
            self._start += len(self._values)
            self._values = next(self._batches)[0]
            if t.is_struct(self._values.type):
                self._values = self._values.field("bytes")
        value = self._values[row - self._start].as_py()
        return value if isinstance(value, bytes) else None

    def _open(self, group: int) -> None:
        self._batches = group_batches(self._file, group, [self._leaf], BATCH_ROWS, BATCH_BYTES)
        self._group, self._start, self._values = group, 0, pa.nulls(0)


def group_batches(
    file: pq.ParquetFile, group: int, columns: Sequence[str], most_rows: int, most_bytes: int
) -> Iterator[pa.RecordBatch]:
    """Yields some columns of a row group, with fewer rows at once where these are large."""
    found = file.metadata.row_group(group)
    chunks = {i for name in columns for i in _chunks(file.metadata, name)}
    size = sum(found.column(i).total_uncompressed_size for i in chunks)
    rows = min(most_rows, max(1, most_bytes * found.num_rows // max(1, size)))
    yield from file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


def _chunks(metadata: pq.FileMetaData, column: str) -> list[int]:
    """Returns the numbers of the leaves of a column."""
    paths = (metadata.schema.column(i).path for i in range(metadata.num_columns))
    return [i for i, path in enumerate(paths) if path == column or path.startswith(f"{column}.")]


def _size(metadata: pq.FileMetaData, group: int, column: str) -> int:
    """Returns the bytes that a column takes in a row group."""
    found = metadata.row_group(group)
    return sum(found.column(i).total_compressed_size for i in _chunks(metadata, column))
