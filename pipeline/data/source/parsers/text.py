"""Reads CSV, TSV and JSONL. What cannot be read costs its own row, and says why.

A CSV or TSV file is read by its physical lines, each of which is one row, an empty line, or a part of a quoted value
that spans lines. A quotation mark that is not closed as it should be therefore never swallows the rows behind it. Its
delimiter is the one by which its first line names the columns. In a JSONL file each line is an object. Files of text
may be compressed with gzip.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.data.source.columns import (
    DELIMITERS,
    IMAGES,
    LIMIT,
    MOST_SHOWN,
    Flaw,
    columns_of,
    meant,
    table_kind,
    text_of,
)
from pipeline.data.source.parsers.child import Budget
from pipeline.data.source.parsers.encoding import HEAD, LONE, encoding_of
from pipeline.errors import UserError
from pipeline.progress import counted, say_once

HEAD_LINES = 100  # of a JSONL file, which say what its columns of references and captions are called
# What looking ahead for the end of a quoted value may cost: this many times what was read, and each line a bit more.
AHEAD, AHEAD_LINE = 4, 32
QUOTED = re.compile(r'"((?:[^"]|"")*)"', re.DOTALL)

csv.field_size_limit(LIMIT)


def text_rows(
    opened: BinaryIO, path: Path, budget: Budget, wanted: Sequence[str], needed: int, encoding: str = ""
) -> Iterator[list[Any] | Flaw]:
    """Yields the rows of a CSV, TSV or JSONL file as ``table_rows`` does."""
    kind = table_kind(path.name)
    with _unpacked(opened, path, budget) as file:
        head = file.read(HEAD)
        if not head:
            raise UserError(f"source {path}: the file is empty; it needs a first line that names the columns")
        encoding = encoding_of(path, head, encoding)
        file.seek(0)
        first = head.decode(encoding, LONE)
        end = "\n" if "\n" in first else "\r"
        lines = _Lines(path, io.TextIOWrapper(file, encoding, LONE, newline=end), end)
        if kind == ".jsonl":
            yield from lines.objects(first, wanted, needed)
        else:
            yield from lines.rows(wanted, needed, "\t" if kind == ".tsv" else ",")


@contextmanager
def _unpacked(file: BinaryIO, path: Path, budget: Budget) -> Iterator[BinaryIO]:
    """Opens a file of text, which gzip may have compressed."""
    if not path.name.lower().endswith(".gz"):
        yield file
        return
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield io.BufferedReader(_Counted(unpacked, budget), 1 << 16)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f"source {path}: cannot be unpacked ({e}); compress it again, or name it unpacked") from None


class _Counted(io.RawIOBase):
    """Counts what is unpacked."""

    def __init__(self, file: gzip.GzipFile, budget: Budget):
        super().__init__()
        self._file, self._budget = file, budget
        self.seek = file.seek  # type: ignore[method-assign]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._file.readinto(buffer)
        self._budget.unpack(size)
        return size


class _Lines:
    """Finds the rows in the physical lines of a file."""

    def __init__(self, path: Path, file: io.TextIOWrapper, end: str):
        self._path, self._file, self._end = path, file, end
        self._encoding = "UTF-8" if file.encoding.startswith("utf-8") else file.encoding
        self._delimiter = ""
        self._ahead: deque[str] = deque()
        self._number = 0  # of the last line that was taken
        self._columns = 0
        self._image = 0  # place of the column of references
        self._read = self._ahead_in_vain = 0  # characters, of all lines and of those that were taken for nothing

    def rows(self, wanted: Sequence[str], needed: int, usual: str) -> Iterator[list[Any] | Flaw]:
        """Yields the rows of lines; their delimiter is ``usual`` unless the first line tells another."""
        first = self._take()
        self._delimiter = _delimiter(first, wanted[:needed], usual)
        header = self._record(first)
        if header is None:
            raise UserError(f"source {self._path}: line 1, which names the columns, has a stray quotation mark")
        header = _trimmed(header, wanted)
        check_header(self._path, header, wanted[:needed], self._delimiter)
        found = columns_of(self._path, header, wanted, needed)
        if self._delimiter != usual:
            say_once(f"{self._path.name}: {self._delimiter!r} is used as the delimiter")
        places = [None if name is None else header.index(name) for name in found]
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
                yield self._lone_surrogate(wanted, values, number) or [value or None for value in values]

    def objects(self, head: str, wanted: Sequence[str], needed: int) -> Iterator[list[Any] | Flaw]:
        """Yields the rows of lines that are JSON objects. Those of ``head`` say what the needed columns are called."""
        read = [parsed_object(line) for line in head.splitlines()[:HEAD_LINES]]
        first = [row for row in read if isinstance(row, dict)]
        if not first:
            raise UserError(f"source {self._path}: line 1 {read[0]}; write one JSON object per line")
        names = list(dict.fromkeys(name for row in first for name in row))
        found = [*columns_of(self._path, names, wanted[:needed], needed), *wanted[needed:]]
        while line := self._take():
            if not line.strip():
                continue
            row = parsed_object(line) if len(line) <= LIMIT else f"has over {LIMIT:,} characters"
            if isinstance(row, str):
                yield Flaw("malformed_row", f"line {self._number} {row}")
                continue
            yield object_values(f"line {self._number}", [row.get(name or "") for name in found], self._encoding)

    def _take(self) -> str:
        """Returns the next line, "" at the end; of one that is too long no more than shows that it is."""
        if self._ahead:
            line = self._ahead.popleft()
        else:
            line = rest = self._file.readline(LIMIT + 1)
            while len(line) > LIMIT and rest and not rest.endswith(self._end):
                rest = self._file.readline(LIMIT)
            self._read += len(line) + AHEAD_LINE
        self._number += bool(line)
        return line

    def _record(self, first: str) -> list[str] | None:
        """Returns the cells of the row that begins with a line, by the strict rules of quoting.

        Returns None if the row breaks them, and then no other line is taken. Where most such rows are broken, none may
        span lines, for each would be looked at from every line before it.
        """
        behind: list[str] = []

        def lines() -> Iterator[str]:
            yield first
            size = len(first)
            while self._ahead_in_vain <= AHEAD * self._read and (line := self._take()):
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
            self._ahead_in_vain += sum(map(len, behind)) + AHEAD_LINE * len(behind)
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
        return _names_image(cells[self._image].strip())

    def _lone_surrogate(self, wanted: Sequence[str], values: Sequence[str], number: int) -> Flaw | None:
        """Returns the flaw of a row that holds bytes which cannot be decoded, in a column that is used."""
        if "".join(values).isascii():
            return None
        for column, value in zip(wanted, values, strict=True):
            try:
                value.encode()
            except UnicodeEncodeError as e:
                byte = f"0x{ord(value[e.start]) - 0xDC00:02x}"
                said = f"line {number}, column {column} holds byte {byte}, which is not {self._encoding}"
                return Flaw("not_utf8", said)
        return None


def check_header(path: Path, header: Sequence[str], needed: Sequence[str], delimiter: str) -> None:
    """Raises UserError for a row in place of the names of columns, with the line that is missing."""
    images = [place for place, name in enumerate(header) if _names_image(name)]
    if not images or all(meant(header, column) for column in needed):
        return
    others = [place for place in range(len(header)) if place != images[0]]
    longest = max(others, key=lambda place: len(header[place]), default=-1)
    names = {images[0]: needed[0], longest: needed[-1]}
    mark = "<tab>" if delimiter == "\t" else delimiter
    line = mark.join(names.get(place, f"column{place + 1}") for place in range(len(header)))
    row = mark.join(header)[:MOST_SHOWN]
    raise UserError(
        f"source {path}: line 1 must name the columns, but is a row ({row}); write a line above it, "
        f"such as {line[:MOST_SHOWN]}"
    )


def _names_image(value: str) -> bool:
    """Returns whether a value looks like a reference."""
    return "://" in value or value.startswith("/") or value.lower().endswith(IMAGES)


def _trimmed(header: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Returns the names of columns without the spaces around them, unless they are wanted so."""
    return [name if name in wanted else name.strip() for name in header]


def _delimiter(line: str, needed: Sequence[str], usual: str) -> str:
    """Returns the delimiter by which a first line names the needed columns, or else has a reference, or is cut."""
    headers: dict[str, list[str]] = {}
    for mark in (usual, *DELIMITERS):
        with suppress(csv.Error):
            headers[mark] = _trimmed(next(csv.reader([line], delimiter=mark), []), needed)
    named = (mark for mark, names in headers.items() if all(meant(names, column) for column in needed))
    rows = (mark for mark, names in headers.items() if len(names) > 1 and any(map(_names_image, names)))
    cut = (mark for mark, names in headers.items() if len(names) > 1)
    return next(chain(named, rows, cut), usual)


def parsed_object(line: str | bytes) -> dict[str, Any] | str:
    """Returns the JSON object of a line, or what is wrong with it."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return "is not JSON"
    return found if isinstance(found, dict) else "is not a JSON object"


def object_values(where: str, values: Sequence[Any], encoding: str = "UTF-8") -> list[Any] | Flaw:
    """Returns values of a JSON object as those of a row, of which the second may be a list."""
    try:
        return [_member(value, several=place == 1) for place, value in enumerate(values)]
    except UnicodeEncodeError:
        return Flaw("not_utf8", f"{where} holds a byte that is not {encoding}, or half a character")
    except ValueError as e:
        return Flaw("malformed_row", f"{where} {e}")


def _member(value: Any, several: bool) -> Any:
    """Returns a value of a JSON object as text, or as a list of texts. Raises ValueError for any other."""
    if isinstance(value, list) and several:
        return [_member(each, several=False) for each in value]
    if isinstance(value, list | dict):
        raise ValueError("has a list or an object in place of a string")
    if isinstance(value, float) and math.isnan(value):  # as pandas writes what is missing
        return None
    text = text_of(value) or None
    (text or "").encode()
    return text


def _unquoted(cell: str) -> str:
    """Returns a cell of a TSV file, whose quotation marks stand for themselves unless both ends have one."""
    found = QUOTED.fullmatch(cell)
    return found[1].replace('""', '"') if found else cell
