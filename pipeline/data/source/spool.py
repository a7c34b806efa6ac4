"""Keeps the rows of lists on disk while their references are compared, so that a list is read once and never held."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa

from pipeline.data.source.duplicates import HASH, Hashes, LaterCaptions, Verdicts, has_many, hashes_of, scratch
from pipeline.data.source.source import ListRow
from pipeline.store import Store
from pipeline.store.records import copy_blob

BLOCK_ROWS = 1000  # written at once
SIZE_BYTES = 8  # of the two sizes before each block: as it is stored, and as it is unpacked


class RowSpool:
    """Holds rows of consecutive parts of a list in temporary files. Use it in a ``with`` statement.

    Attributes:
        count: Rows.
        left: Rows with captions whose image an earlier row names, and which no row has taken; known behind ``judged``.
    """

    def __init__(self) -> None:
        self.count = self.left = 0
        self._parts: list[tuple[int, int]] = []  # where the blocks of each begin, and its rows
        self._offset = 0  # of the hashes in their file
        with scratch(), ExitStack() as stack:
            self._blocks: IO[bytes] = stack.enter_context(tempfile.NamedTemporaryFile(prefix="unclip-rows-"))
            self._hashes: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, rows: Iterable[ListRow], reference: Callable[[ListRow], str]) -> None:
        """Appends a part.

        Args:
            rows: Rows of the part, read as they are written.
            reference: Function that returns the reference by which a row is a duplicate, "" for none.
        """
        begins, before = self._blocks.tell(), self.count
        rest = iter(rows)
        while block := list(islice(rest, BLOCK_ROWS)):
            data = json.dumps(list(map(row_values, block))).encode()
            packed = pa.compress(data, "zstd", asbytes=True)
            sizes = b"".join(size.to_bytes(SIZE_BYTES, "little") for size in (len(packed), len(data)))
            hashes = hashes_of(map(reference, block)).tobytes()
            with scratch():
                self._blocks.write(sizes + packed)
                self._hashes.write(hashes)
            self.count += len(block)
        self._parts.append((begins, self.count - before))

    def hashes(self) -> Hashes:
        """Returns the hashes of the references of all rows, [count], in a mapped file."""
        with scratch():
            self._hashes.flush()
            return np.memmap(self._hashes, HASH, "r", self._offset, (self.count,)) if self.count else np.empty(0, HASH)

    def save(self) -> Path:
        """Returns a file of all that it holds, which is there until the ``with`` statement ends. Nothing follows."""
        parts = json.dumps(self._parts).encode()
        with scratch():
            self._hashes.seek(0)
            shutil.copyfileobj(self._hashes, self._blocks)
            self._blocks.write(parts + len(parts).to_bytes(SIZE_BYTES, "little"))
            self._blocks.flush()
        return Path(self._blocks.name)

    @classmethod
    def load(cls, store: Store, blob: str) -> RowSpool:
        """Returns the spool of which a blob holds the file. Raises CorruptObject."""
        spool = cls()
        try:
            with scratch():
                copy_blob(store, blob, spool._blocks)
                spool._blocks.seek(-SIZE_BYTES, os.SEEK_END)
                size = int.from_bytes(spool._blocks.read(SIZE_BYTES), "little")
                place = spool._blocks.seek(-SIZE_BYTES - size, os.SEEK_END)
                spool._parts = [(begins, count) for begins, count in json.loads(spool._blocks.read(size))]
            spool.count = sum(count for _, count in spool._parts)
            spool._hashes, spool._offset = spool._blocks, place - spool.count * HASH.itemsize
        except BaseException:
            spool._stack.close()
            raise
        return spool

    def rows(self) -> Iterator[ListRow]:
        """Yields the rows as they were added."""
        return chain.from_iterable(self._rows(begins, count) for begins, count in self._parts)

    def judged(self, duplicate: Verdicts) -> Iterator[tuple[ListRow, bool]]:
        """Yields the rows, each with whether an earlier one has its reference.

        Where a part has many such rows, the first row of an image has the captions of the others in that part.
        """
        place = 0
        for begins, count in self._parts:
            flags = duplicate[place : place + count]
            many = has_many(int(flags.sum()), count)
            later = LaterCaptions(zip(self._rows(begins, count), map(bool, flags), strict=True) if many else ())
            for row, again in zip(self._rows(begins, count), map(bool, flags), strict=True):
                yield (row if again else later.join(row)), again
            self.left += later.left
            place += count

    def _rows(self, begins: int, count: int) -> Iterator[ListRow]:
        return chain.from_iterable(self._read(begins, count))

    def _read(self, place: int, count: int) -> Iterator[list[ListRow]]:
        while count:
            with scratch():
                self._blocks.seek(place)
                packed, size = (int.from_bytes(self._blocks.read(SIZE_BYTES), "little") for _ in range(2))
                data = pa.decompress(self._blocks.read(packed), size, "zstd", asbytes=True)
            rows = list(map(row_of, json.loads(data)))
            place += 2 * SIZE_BYTES + packed
            count -= len(rows)
            yield rows


def row_values(row: ListRow) -> list[Any]:
    """Returns a row as values of JSON."""
    return list(vars(row).values())


def row_of(values: Sequence[Any]) -> ListRow:
    """Returns the row that ``row_values`` made values of."""
    url, captions, *rest = values
    return ListRow(url, tuple(captions), *rest)
