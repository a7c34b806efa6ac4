"""Reads tables of rows: CSV, TSV and Parquet. A line or a value that cannot be read costs its own row, and says why.

A CSV or TSV file is read by its physical lines, each of which is one row, an empty line, or a part of a quoted value
that spans lines. A quotation mark that is not closed as it should be therefore never swallows the rows behind it.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as t

from pipeline.errors import UserError
from pipeline.local import open_local
from pipeline.progress import counted

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
LIMIT = 1 << 20  # characters of a row of a CSV or TSV file, of a value in Parquet, of a file of captions
BATCH_ROWS = 10_000  # read from a Parquet file at once, at most
BATCH_BYTES = 64 << 20  # of the columns that are used, about
_HEAD = 1 << 20  # bytes by which the encoding of a file is judged
QUOTED = re.compile(r'"((?:[^"]|"")*)"', re.DOTALL)

csv.field_size_limit(LIMIT)


@dataclass(frozen=True)
class Flaw:
    """Says why a row cannot be read: a reason of pipeline.ledger, and for a message what is wrong, and where."""

    reason: str
    what: str


def table_rows(path: Path, needed: Sequence[str], optional: Sequence[str]) -> Iterator[list[Any] | Flaw]:
    """Yields for each row its values in ``needed`` and ``optional`` columns.

    A value is text, a list of texts and Nones, or None where it is empty or its column is absent.

    Args:
        path: Of a CSV, TSV or Parquet file.
        needed: The columns of the references of images and of the captions.
        optional: Other columns.

    Raises:
        UserError: for a file that cannot be read, is not UTF-8, lacks a column, or has one twice or of another type.
    """
    rows = _parquet_rows if path.suffix.lower() == ".parquet" else _text_rows
    return rows(path, [*needed, *optional], len(needed))


def _places(path: Path, names: Sequence[str], wanted: Sequence[str], needed: int) -> list[int | None]:
    """Returns where the wanted columns are among the columns of a file."""
    counts = Counter(names)
    for column in wanted[:needed]:
        if not counts[column]:
            raise UserError(
                f"source {path}: no column {column}; it has {', '.join(names)}. "
                "Set source.image_column or source.caption_column"
            )
    for column in wanted:
        if counts[column] > 1:
            raise UserError(f"source {path}: {counts[column]} columns are called {column}; rename all but one")
    return [names.index(column) if counts[column] else None for column in wanted]


# --- CSV and TSV ------------------------------------------------------------------------------------------------------


def _text_rows(path: Path, wanted: Sequence[str], needed: int) -> Iterator[list[Any] | Flaw]:
    with open_local(path) as file:
        head = file.read(_HEAD)
        _check_encoding(path, head)
        file.seek(0)
        # Bytes that are not UTF-8 become lone surrogates, which only their own row is asked for.
        end = "\n" if b"\n" in head else "\r"
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=end)
        yield from _Lines(path, text, "\t" if path.suffix.lower() == ".tsv" else ",", end).rows(wanted, needed)


def _check_encoding(path: Path, head: bytes) -> None:
    """Refuses a file that was not written as UTF-8. It is not guessed what else it is: a wrong guess mangles text."""
    remedy = f"save it as UTF-8, for instance with: iconv -f ENCODING -t UTF-8 {path.name} > utf8{path.suffix}"
    if not head:
        raise UserError(f"source {path}: the file is empty; it needs a first line that names the columns")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"source {path}: byte 1 begins the mark of UTF-16; {remedy}, where ENCODING is UTF-16")
    lines = head.split(b"\n")
    if b"\0" in lines[0]:
        raise UserError(f"source {path}: line 1 holds a NUL, as UTF-16 does, and binary files do; {remedy}")
    whole = lines if len(head) < _HEAD else lines[:-1] or lines
    wrong = [(number, place) for number, line in enumerate(whole, 1) if (place := _not_utf8(line)) is not None]
    # A few such lines cost their rows; more than one in ten, and the file is in another encoding.
    if 10 * len(wrong) > len(whole):
        number, place = wrong[0]
        raise UserError(
            f"source {path}: not UTF-8: byte {place + 1} of line {number} is 0x{whole[number - 1][place]:02x}, "
            f"and {len(wrong):,} of the first {len(whole):,} lines hold such bytes; {remedy}, where ENCODING is "
            "WINDOWS-1252 if a Western European Excel wrote it"
        )


def _not_utf8(line: bytes) -> int | None:
    try:
        line.decode()
    except UnicodeDecodeError as e:
        return e.start
    return None


class _Lines:
    """Finds the rows in the physical lines of a file."""

    def __init__(self, path: Path, file: io.TextIOWrapper, delimiter: str, end: str):
        self._path, self._file, self._delimiter, self._end = path, file, delimiter, end
        self._ahead: deque[str] = deque()
        self._number = 0  # of the last line that was taken
        self._columns = 0
        self._image = 0  # place of the column of references

    def rows(self, wanted: Sequence[str], needed: int) -> Iterator[list[Any] | Flaw]:
        header = self._record(self._take())
        if header is None:
            raise UserError(f"source {self._path}: line 1, which names the columns, has a stray quotation mark")
        places = _places(self._path, header, wanted, needed)
        self._columns, self._image = len(header), places[0] or 0
        while line := self._take():
            if not line.strip("\r\n"):
                continue
            number = self._number
            if len(line) > LIMIT:
                yield Flaw("malformed_row", f"line {number} has over {LIMIT:,} characters")
                continue
            cells = self._record(line) if '"' in line else line.rstrip("\r\n").split(self._delimiter)
            if self._delimiter == "\t" and (cells is None or len(cells) != self._columns):
                cells = [_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")]
            if cells is None:
                yield Flaw("malformed_row", f"line {number} has a stray quotation mark")
            elif len(cells) != self._columns:
                names = counted(self._columns, "column")
                said = f"line {number} has {counted(len(cells), 'value')}, where line 1 names {names}"
                yield Flaw("malformed_row", said)
            else:
                values = ["" if place is None else cells[place] for place in places]
                yield _lone_surrogate(wanted, values, number) or [value or None for value in values]

    def _take(self) -> str:
        """Returns the next line, "" at the end; of one that is too long no more than shows that it is."""
        if self._ahead:
            line = self._ahead.popleft()
        else:
            line = rest = self._file.readline(LIMIT + 1)
            while len(line) > LIMIT and rest and not rest.endswith(self._end):
                rest = self._file.readline(LIMIT)
        self._number += bool(line)
        return line

    def _record(self, first: str) -> list[str] | None:
        """Returns the cells of the row that begins with a line, by the strict rules of quoting.

        Returns None if the row breaks them, and then no other line is taken.
        """
        behind: list[str] = []

        def lines() -> Iterator[str]:
            yield first
            size = len(first)
            while line := self._take():
                behind.append(line)
                size += len(line)
                if size > LIMIT or self._is_row(line):
                    return
                yield line

        try:
            cells = next(csv.reader(lines(), delimiter=self._delimiter, strict=True))
        except csv.Error:
            cells = None
        if behind and (cells is None or self._columns not in (0, len(cells))):
            self._ahead.extendleft(reversed(behind))
            self._number -= len(behind)
            return None
        return cells

    def _is_row(self, line: str) -> bool:
        """Returns whether a line inside of a quoted value is by itself a row with a reference.

        Then the quotation mark before it was a stray one. A mark in the line may end the value, so only what stands
        before it counts as a reference.
        """
        before, mark, _ = line.partition('"')
        if mark and before.count(self._delimiter) <= self._image:
            return False
        try:
            cells = next(csv.reader([line], delimiter=self._delimiter, strict=True), [])
        except csv.Error:
            return False
        if not self._columns or len(cells) != self._columns:
            return False
        reference = cells[self._image].strip()
        return "://" in reference or reference.startswith("/") or reference.lower().endswith(IMAGES)


def _unquoted(cell: str) -> str:
    """Returns a cell of a TSV file, whose quotation marks stand for themselves unless both ends have one."""
    found = QUOTED.fullmatch(cell)
    return found[1].replace('""', '"') if found else cell


def _lone_surrogate(wanted: Sequence[str], values: Sequence[str], number: int) -> Flaw | None:
    """Returns the flaw of a row that holds bytes which are not UTF-8, in a column that is used."""
    if "".join(values).isascii():
        return None
    for column, value in zip(wanted, values, strict=True):
        try:
            value.encode()
        except UnicodeEncodeError as e:
            byte = ord(value[e.start]) - 0xDC00
            return Flaw("not_utf8", f"line {number}, column {column} holds byte 0x{byte:02x}, which is not UTF-8")
    return None


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, wanted: Sequence[str], needed: int) -> Iterator[list[Any] | Flaw]:
    number = 0
    try:
        with open_local(path) as opened, pq.ParquetFile(opened, buffer_size=1 << 20) as file:
            schema = file.schema_arrow
            places = _places(path, schema.names, wanted, needed)
            used = [column for column, place in zip(wanted, places, strict=True) if place is not None]
            for i, column in enumerate(wanted):
                if column in used:
                    _check_type(path, column, schema.field(column).type, i)
            for batch in _batches(file, used):
                columns = [_values(batch[c]) if c in used else [None] * batch.num_rows for c in wanted]
                for row in zip(*columns, strict=True):
                    number += 1
                    yield _texts(wanted, row, number)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        where = f" behind row {number:,}" if number else ""
        raise UserError(f"source {path}: cannot be read{where} ({(str(e) or repr(e)).splitlines()[0]})") from None


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
        wants = "references as text" if place == 0 else "text, or lists of text" if place == 1 else "text or numbers"
        raise UserError(
            f"source {path}: column {column} holds {kind}, not {wants}; write it so, or name another column"
        )


def _batches(file: pq.ParquetFile, used: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yields record batches of the used columns, with fewer rows at once where these are large."""
    metadata = file.metadata
    chunks = [
        i for i in range(metadata.num_columns) if any(_belongs(metadata.schema.column(i).path, name) for name in used)
    ]
    for group in range(metadata.num_row_groups):
        found = metadata.row_group(group)
        size = sum(found.column(i).total_uncompressed_size for i in chunks)
        rows = min(BATCH_ROWS, max(1, BATCH_BYTES * found.num_rows // max(1, size)))
        yield from file.iter_batches(rows, row_groups=[group], columns=used)


def _belongs(path: str, column: str) -> bool:
    return path == column or path.startswith(f"{column}.")


def _values(array: pa.Array) -> list[Any]:
    """Returns the values of a column, with text that is not UTF-8 as bytes, and NaN as None."""
    if t.is_dictionary(array.type):
        values = _values(array.dictionary)
        return [None if i is None else values[i] for i in array.indices.to_pylist()]
    if t.is_floating(array.type):
        return [None if value != value else value for value in array.to_pylist()]
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        many = t.is_list(array.type) or t.is_large_list(array.type)
        return list(array.cast(pa.list_(pa.binary()) if many else pa.binary()).to_pylist())


def _texts(wanted: Sequence[str], row: Sequence[Any], number: int) -> list[Any] | Flaw:
    values: list[Any] = []
    for column, value in zip(wanted, row, strict=True):
        try:
            values.append([_text(each) for each in value] if isinstance(value, list) else _text(value))
        except UnicodeDecodeError as e:
            byte = e.object[e.start]
            return Flaw("not_utf8", f"row {number}, column {column} holds byte 0x{byte:02x}, which is not UTF-8")
        except ValueError as e:
            return Flaw("malformed_row", f"row {number}, column {column} {e}")
    return values


def _text(value: Any) -> str | None:
    """Returns a value as text. Raises UnicodeDecodeError, and ValueError for one that is too long."""
    if isinstance(value, str | bytes) and len(value) > LIMIT:
        raise ValueError(f"has over {LIMIT:,} characters")
    return (
        value if value is None or isinstance(value, str) else value.decode() if isinstance(value, bytes) else str(value)
    )
