"""Which references of a list an earlier row has too, found by hash in parts, so that memory stays bounded.

A reference counts as 64 bits of hash. Hashes go to 256 files of a temporary folder by their first byte, so that equal
ones meet in one file, and then one file after the other is looked through. Among a billion rows two references share a
hash with a chance of 3 percent, which would cost the later one.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.errors import UserError

PARTS = 256
BLOCK_ROWS = 1 << 16  # held while their hashes are spread
CHUNK = 1 << 20  # hashes read at once
HASH = np.dtype("<u8")
_ROW = np.dtype([("hash", HASH), ("row", HASH)])


@dataclass(frozen=True)
class Judged:
    """``duplicate``: a file of one byte a row, in order, 1 where an earlier row has the reference. ``fresh``: a file of
    the hashes that were not seen before, uint64 and sorted."""

    duplicate: Path
    fresh: Path


class Seen:
    """The references of all rows so far, in temporary files: 17 bytes each, or 8 if they were added as hashes.

    In memory are one block of rows and one part of those that are being judged, some 1/256. To be used as a context.
    Raises UserError if there is no room for temporary files.
    """

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="unclip-references-")
        self._folder = Path(self._temporary.name)
        self._lists = 0

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *error: object) -> None:
        self._temporary.cleanup()

    def add(self, hashes: np.ndarray) -> None:
        """Count hashes (uint64 [n]) as seen."""
        self._spread("seen", hashes, hashes)

    def judge(self, references: Iterable[str]) -> Judged:
        """Look for the references of further rows, in order, which are seen from then on. An empty one is no reference:
        never a duplicate, never seen."""
        self._lists += 1
        judged = Judged(self._folder / f"duplicate {self._lists}", self._folder / f"fresh {self._lists}")
        judged.duplicate.touch()
        judged.fresh.touch()
        start, rest = 0, iter(references)
        while block := list(islice(rest, BLOCK_ROWS)):
            places = [i for i, reference in enumerate(block) if reference]
            rows = np.empty(len(places), _ROW)
            rows["hash"] = hashes_of(block[i] for i in places)
            rows["row"] = np.array(places, HASH) + HASH.type(start)
            self._spread("own", rows["hash"], rows)
            self._append(judged.duplicate, np.zeros(len(block), np.uint8))
            start += len(block)
        if start:
            flags = np.memmap(judged.duplicate, np.uint8)
            for part in range(PARTS):
                self._judge_part(part, flags, judged.fresh)
        return judged

    def _judge_part(self, part: int, flags: np.ndarray, fresh: Path) -> None:
        own, seen = self._folder / f"own {part}", self._folder / f"seen {part}"
        if not own.exists():
            return
        rows = np.fromfile(own, _ROW)
        own.unlink()
        rows = rows[np.argsort(rows["hash"], kind="stable")]  # of equal ones the earliest row stays first
        first = np.append(True, rows["hash"][1:] != rows["hash"][:-1])
        distinct = rows["hash"][first]
        known = np.zeros(len(distinct), bool)
        for chunk in read_hashes(seen):
            place = np.minimum(np.searchsorted(distinct, chunk), len(distinct) - 1)
            known[place[distinct[place] == chunk]] = True
        flags[rows["row"][~first | known[np.cumsum(first) - 1]]] = 1
        for file in (fresh, seen):
            self._append(file, distinct[~known])

    def _spread(self, name: str, hashes: np.ndarray, rows: np.ndarray) -> None:
        part = (hashes >> HASH.type(56)).astype(np.uint8)
        ends = np.cumsum(np.bincount(part, minlength=PARTS))
        for i, own in enumerate(np.split(rows[np.argsort(part, kind="stable")], ends[:-1])):
            if len(own):
                self._append(self._folder / f"{name} {i}", own)

    def _append(self, path: Path, rows: np.ndarray) -> None:
        try:
            with open(path, "ab") as file:
                file.write(rows.tobytes())
        except OSError as e:
            raise UserError(
                f"{self._folder}: {e.strerror}; looking for duplicate references takes 17 bytes a row there, so "
                "free space, or name another folder in TMPDIR"
            ) from None


def hashes_of(references: Iterable[str]) -> np.ndarray:
    """uint64 [n]."""
    return np.frombuffer(b"".join(hashlib.blake2b(r.encode(), digest_size=8).digest() for r in references), HASH)


def read_hashes(file: Path) -> Iterator[np.ndarray]:
    """The hashes in a file, if there is one, in arrays of at most CHUNK."""
    if file.exists():
        with open(file, "rb") as f:
            while data := f.read(CHUNK * HASH.itemsize):
                yield np.frombuffer(data, HASH)
