"""Reads Parquet tables, only the columns that are used, and few rows at once where these are large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as t

from pipeline.data.source.columns import LIMIT, Flaw, columns_of, text_of
from pipeline.data.source.parsers.cells import cell_references, group_batches, holds_images
from pipeline.data.source.parsers.child import Budget
from pipeline.errors import UserError

BATCH_ROWS = 4_096  # read at once, at most
BATCH_BYTES = 16 << 20  # of the columns that are used, about
_PLAIN = {str, type(None)}


def parquet_rows(
    opened: BinaryIO, path: Path, budget: Budget, wanted: Sequence[str], needed: int
) -> Iterator[list[Any] | Flaw]:
    """Yields the rows of a Parquet file as ``table_rows`` does; the first ``needed`` columns have to be there.

    Where the first column holds images, these are not read: each row has a reference to its own.
    """
    number = 0
    try:
        # Text as dictionaries: a value that many rows name by its number would be written out for each.
        leaves = _text_leaves(opened)
        with pq.ParquetFile(opened, buffer_size=1 << 20, read_dictionary=leaves) as file:
            schema = file.schema_arrow
            found = columns_of(path, schema.names, wanted, needed)
            images = found[0] if found[0] and holds_images(file, found[0]) else None
            cells = cell_references(path, images, file.metadata) if images else iter(())
            used = [name for name in found if name not in (None, images)]
            for i, name in enumerate(found):
                if name in used:
                    _check_type(path, name, schema.field(name).type, i)
            groups = range(file.metadata.num_row_groups)
            for batch in chain.from_iterable(group_batches(file, i, used, BATCH_ROWS, BATCH_BYTES) for i in groups):
                n = batch.num_rows
                columns = [_values(batch[name]) if name in used else [None] * n for name in found]
                if images:
                    columns[0] = list(islice(cells, n))
                for row in zip(*columns, strict=True):
                    number += 1
                    yield _texts(wanted, row, number)
    except MemoryError:  # Arrow's is an ArrowException, too
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        where = f" behind row {number:,}" if number else ""
        raise UserError(f"source {path}: cannot be read{where} ({(str(e) or repr(e)).splitlines()[0]})") from None


def parquet_count(opened: BinaryIO, path: Path, budget: Budget) -> Iterator[list[Any] | Flaw]:
    """Yields the number of rows of a Parquet file, as the only value of a row."""
    with pq.ParquetFile(opened) as file:
        yield [str(file.metadata.num_rows)]


def _text_leaves(opened: BinaryIO) -> list[str]:
    """Returns the paths of the columns of a file that hold text or bytes, also inside of lists."""
    found = pq.read_metadata(opened).schema
    return [found.column(i).path for i in range(len(found)) if found.column(i).physical_type == "BYTE_ARRAY"]


def _check_type(path: Path, column: str, kind: pa.DataType, place: int) -> None:
    """Refuses a column of values that it cannot hold.

    These are references in the first column, captions or lists of them in the second, and in any other what can be
    written as text.
    """
    inner = kind.value_type if place == 1 and (t.is_list(kind) or t.is_large_list(kind)) else kind
    plain = inner.value_type if t.is_dictionary(inner) else inner
    text = (t.is_string, t.is_large_string, t.is_string_view, t.is_binary, t.is_large_binary, t.is_null)
    number = (t.is_integer, t.is_floating, t.is_boolean, t.is_decimal, t.is_temporal)
    if not any(is_it(plain) for is_it in (text if place == 0 or inner is not kind else (*text, *number))):
        wants = ("references as text, or images", "text, or lists of text", "text or numbers")[min(place, 2)]
        raise UserError(
            f"source {path}: column {column} holds {kind}, not {wants}; write it so, or name another column"
        )


def _values(array: pa.Array) -> list[Any]:
    """Returns the values of a column, with text that is not UTF-8 as bytes, and NaN as None."""
    if t.is_dictionary(array.type):
        used = array.indices.unique().drop_null()  # of a batch, few of a large dictionary
        named = dict(zip(used.to_pylist(), _values(array.dictionary.take(used)), strict=True))
        return [named.get(i) for i in array.indices.to_pylist()]
    if t.is_list(array.type) or t.is_large_list(array.type):
        start, stop = (array.offsets[i].as_py() for i in (0, -1))
        values = _values(array.values.slice(start, stop - start))
        ends = [end - start for end in array.offsets.to_pylist()]
        there = array.is_valid().to_pylist()
        return [values[a:b] if valid else None for a, b, valid in zip(ends, ends[1:], there, strict=False)]
    if t.is_floating(array.type):
        return [None if value != value else value for value in array.to_pylist()]
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        return list(array.cast(pa.binary()).to_pylist())
    except (OverflowError, ValueError, KeyError):  # a time that Python has not, or a zone that it does not know
        return list(map(_time, array))


def _time(value: pa.Scalar) -> Any:
    """Returns a datetime, or the raw integer of one that is out of range."""
    try:
        return value.as_py()
    except (OverflowError, ValueError, KeyError):
        return getattr(value, "value", None)


def _texts(wanted: Sequence[str], row: Sequence[Any], number: int) -> list[Any] | Flaw:
    if {*map(type, row)} <= _PLAIN and max(map(len, filter(None, row)), default=0) <= LIMIT:
        return list(row)
    values: list[Any] = []
    for column, value in zip(wanted, row, strict=True):
        try:
            values.append([text_of(each) for each in value] if isinstance(value, list) else text_of(value))
        except UnicodeDecodeError as e:
            byte = e.object[e.start]
            return Flaw("not_utf8", f"row {number}, column {column} holds byte 0x{byte:02x}, which is not UTF-8")
        except ValueError as e:
            return Flaw("malformed_row", f"row {number}, column {column} {e}")
    return values
