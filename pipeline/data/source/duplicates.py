"""Finds the rows of a list that name an image which an earlier row names, and joins their captions to it."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Self, TypeAlias

import numpy as np

from pipeline.data.fetch.references import comparable
from pipeline.data.source.columns import MAX_CAPTIONS
from pipeline.data.source.source import ListRow
from pipeline.errors import UserError
from pipeline.progress import counted

HASH = np.dtype("<u8")  # of a reference
_NO_HASH = 0  # of an empty reference
Hashes: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint64]]"
Verdicts: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.bool_]]"
AT_ONCE = 4 << 20  # hashes that are compared at once: some 400 MB
LOOKED_AT = 16 << 20  # hashes among which those are looked for
MOST_LATER = 64 << 20  # characters of captions that are kept for the first rows of their images
MOST_JOINED = 1000  # rows of one image that are in memory at once
BUCKETS = 1 << 10  # equal ranges of hashes, of which ranges are made
FEW, SHARE = 10, 0.05  # duplicates, and their share of all rows: a list with more has a row for each caption
log = logging.getLogger("unclip")


@contextmanager
def scratch() -> Iterator[None]:
    """Makes one sentence of an error of the disk for temporary files."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"the rows of the list do not fit into {tempfile.gettempdir()} ({e.strerror or e}); set TMPDIR to a "
            "folder with as much free space as the list takes, and run the same command again"
        ) from None


@dataclass(frozen=True)
class Judged:
    """Says for each row whether an earlier one has its reference, and has the new hashes, sorted."""

    duplicate: Verdicts
    fresh: Hashes


class SeenReferences:
    """Keeps the hashes of all references so far, 64 bits each, and finds what an earlier row has, too.

    They lie in a temporary file, and are compared in ranges of AT_ONCE: of a list memory holds a byte a row. Among a
    billion rows two references share a hash with a chance of 3 percent, which would cost the later one. Use it in a
    ``with`` statement.
    """

    def __init__(self) -> None:
        with scratch(), ExitStack() as stack:
            self._file = stack.enter_context(tempfile.TemporaryFile())
            self._stack = stack.pop_all()
        self._ends = [0]  # of sorted runs in it, in hashes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, hashes: Hashes) -> None:
        """Counts sorted hashes as seen."""
        self._write(hashes)
        self._ends.append(self._ends[-1] + len(hashes))

    def judge(self, hashes: Hashes) -> Judged:
        """Looks for the references of further rows, which are seen from then on.

        The hash of an empty one is of no reference: never a duplicate, never seen.
        """
        everything = self._read()
        earlier = [everything[a:b] for a, b in pairwise(self._ends) if a < b]
        duplicate = np.array(hashes != _NO_HASH)
        count = 0
        ways = max(1, -(-len(hashes) // AT_ONCE))
        for low, high in pairwise((i << 64) // ways for i in range(ways + 1)):
            bounds = np.array([low, high - 1], HASH)
            places = _within(hashes, bounds)
            distinct, first = np.unique(hashes[places], return_index=True)
            known = distinct == _NO_HASH
            for run in earlier:
                begin, end = np.searchsorted(run, bounds[0]), np.searchsorted(run, bounds[1], "right")
                mark_known(distinct, run[begin:end], known)
            duplicate[places[first[~known]]] = False
            self._write(distinct[~known])
            count += int((~known).sum())
        self._ends.append(self._ends[-1] + count)
        return Judged(duplicate, self._read()[self._ends[-2] :])

    def _write(self, hashes: Hashes) -> None:
        with scratch():
            self._file.write(hashes.tobytes())
            self._file.flush()

    def _read(self) -> Hashes:
        return np.memmap(self._file, HASH, "r") if self._file.tell() else np.empty(0, HASH)


def ranges(ways: int) -> list[tuple[int, int]]:
    """Returns the first bucket of each of ``ways`` ranges of hashes, about equal, and the one behind its last."""
    return list(pairwise(i * BUCKETS // ways for i in range(ways + 1)))


def within_range(hashes: Hashes, low: int, high: int) -> Hashes:
    """Returns those of sorted hashes that are in buckets [low, high)."""
    width = (1 << 64) // BUCKETS
    begin, last = np.array([low * width, high * width - 1], HASH)
    return hashes[np.searchsorted(hashes, begin) : np.searchsorted(hashes, last, "right")]


def cut_ranges(hashes: Hashes, ways: int) -> Iterator[Hashes]:
    """Yields sorted hashes by range."""
    return (within_range(hashes, low, high) for low, high in ranges(ways))


def mark_known(distinct: Hashes, run: Hashes, known: Verdicts) -> None:
    """Marks in ``known`` which of some sorted hashes are among others. Either may be much longer than the other."""
    if not len(distinct) or not len(run):
        return
    if len(distinct) < len(run):
        place = np.minimum(np.searchsorted(run, distinct), len(run) - 1)
        known |= run[place] == distinct
    else:
        place = np.minimum(np.searchsorted(distinct, run), len(distinct) - 1)
        known[place[distinct[place] == run]] = True


def _within(hashes: Hashes, bounds: Hashes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Returns the places of the hashes from the first bound to the last, in order."""
    found = [np.empty(0, np.int64)]
    for at in range(0, len(hashes), LOOKED_AT):
        some = hashes[at : at + LOOKED_AT]
        found.append(np.flatnonzero((some >= bounds[0]) & (some <= bounds[1])) + at)
    return np.concatenate(found)


def has_many(duplicates: int, rows: int) -> bool:
    """Returns whether a list has more duplicates than chance brings along."""
    return duplicates > max(FEW, SHARE * rows)


class LaterCaptions:
    """Holds the captions of rows that name the image of an earlier row of their list, for that row.

    Rows that differ in more than their captions do not join, and those beyond MOST_LATER characters; both are left out.
    """

    # Only for lists with many such rows: in others a row that is appended must not change a shard that is made.
    def __init__(self, rows: Iterable[tuple[ListRow, bool]]):
        """Takes all rows of a list, each with whether it is a duplicate."""
        self._captions: dict[bytes, list[tuple[str, ...]]] = {}
        self.left = 0  # rows with captions that no row has taken
        room = MOST_LATER
        for row, again in rows:
            if again and row.captions and not row.reject:
                self.left += 1
                if (room := room - sum(map(len, row.captions))) >= 0:
                    self._captions.setdefault(_agreed(row), []).append(row.captions)

    def join(self, row: ListRow) -> ListRow:
        """Returns the first row of an image with the captions of the others."""
        later = self._captions.pop(_agreed(row), []) if self._captions and not row.reject else []
        self.left -= len(later)
        return _joined(row, later) if later else row


def merged(rows: Iterable[ListRow]) -> Iterator[ListRow]:
    """Yields rows with the captions of those that follow and name the same image, as in lists with a row a caption.

    Rows that differ in more than their captions stay rows of their own.
    """
    same: list[ListRow] = []
    for row in rows:
        if same and not (row.url and row.url == same[0].url and not row.reject and _beyond(row) == _beyond(same[0])):
            yield _as_one(same)
            same = []
        same.append(row)
        if len(same) == MOST_JOINED:
            same = [_as_one(same)]
    if same:
        yield _as_one(same)


def _as_one(rows: Sequence[ListRow]) -> ListRow:
    return _joined(rows[0], [other.captions for other in rows[1:]]) if len(rows) > 1 else rows[0]


def _joined(first: ListRow, others: Iterable[tuple[str, ...]]) -> ListRow:
    """Returns a row with its captions and those of others, each once, within MAX_CAPTIONS."""
    captions = dict.fromkeys(first.captions)
    room = MAX_CAPTIONS - sum(map(len, first.captions))
    for caption in chain.from_iterable(others):
        if len(caption) <= room and caption not in captions:
            captions[caption] = None
            room -= len(caption)
    return replace(first, captions=tuple(captions))


def _agreed(row: ListRow) -> bytes:
    """Returns a digest of what rows agree in whose captions are joined."""
    return hashlib.blake2b("\0".join((comparable(row.url), *_beyond(row))).encode(), digest_size=16).digest()


def _beyond(row: ListRow) -> tuple[str, ...]:
    """Returns what a row says besides its image and its captions."""
    return row.group, row.split, row.sha256, row.license, row.attribution


def hashes_of(references: Iterable[str]) -> Hashes:
    """Returns the hashes of references, _NO_HASH for an empty one."""
    return np.fromiter(map(_hash, references), HASH)


def _hash(reference: str) -> int:
    hashed = hashlib.blake2b(reference.encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "little") if reference else _NO_HASH


def warn_of_captions(what: str, again: int, rows: int) -> None:
    """Says where many captions are left out, since an earlier row names their image: ``again`` of ``rows`` rows."""
    if has_many(again, rows):
        log.warning(
            "%s: %s repeat the image of an earlier row, so their captions are left out: only rows of one file that "
            "differ in nothing else are merged",
            what,
            counted(again, "row"),
        )
