"""Finds the rows of a list that name an image which an earlier row names, and joins their captions to it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from pipeline.data.fetch.references import comparable
from pipeline.data.source.columns import MAX_CAPTIONS
from pipeline.data.source.source import ListRow
from pipeline.progress import counted

HASH = np.dtype("<u8")  # of a reference
_NO_HASH = 0  # of an empty reference
Hashes: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint64]]"
MOST_LATER = 64 << 20  # characters of captions that are kept for the first rows of their images
MOST_JOINED = 1000  # rows of one image that are in memory at once
FEW, SHARE = 10, 0.05  # duplicates, and their share of all rows: a list with more has a row for each caption
log = logging.getLogger("unclip")


@dataclass(frozen=True)
class Judged:
    """Says for each row whether an earlier one has its reference, and has the new hashes, sorted."""

    duplicate: np.ndarray[tuple[int], np.dtype[np.bool_]]
    fresh: Hashes


class SeenReferences:
    """Keeps the hashes of all references so far, 64 bits each, and finds what an earlier row has, too.

    Cutting a list takes some 40 bytes a row, and each row of the lists before it 8. Among a billion rows two references
    share a hash with a chance of 3 percent, which would cost the later one.
    """

    def __init__(self) -> None:
        self._parts: list[Hashes] = []

    def add(self, hashes: Hashes) -> None:
        """Counts hashes as seen."""
        self._parts.append(hashes)

    def judge(self, references: Iterable[str]) -> Judged:
        """Looks for the references of further rows, which are seen from then on.

        An empty one is not a reference: never a duplicate, never seen.
        """
        hashes = hashes_of(references)
        distinct, first = np.unique(hashes, return_index=True)
        known = distinct == _NO_HASH
        for earlier in self._parts if len(distinct) else ():
            place = np.minimum(np.searchsorted(distinct, earlier), len(distinct) - 1)
            known[place[distinct[place] == earlier]] = True
        duplicate = hashes != _NO_HASH
        duplicate[first[~known]] = False
        fresh = distinct[~known]
        self.add(fresh)
        return Judged(duplicate, fresh)


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
        self._rows: dict[tuple[str, ...], list[ListRow]] = {}
        self.left = 0  # rows with captions that no row has taken
        room = MOST_LATER
        for row, again in rows:
            if again and row.captions and not row.reject:
                self.left += 1
                if (room := room - sum(map(len, row.captions))) >= 0:
                    self._rows.setdefault(_agreed(row), []).append(row)

    def join(self, row: ListRow) -> ListRow:
        """Returns the first row of an image with the captions of the others."""
        later = self._rows.pop(_agreed(row), []) if self._rows and not row.reject else []
        self.left -= len(later)
        return _joined([row, *later]) if later else row


def merged(rows: Iterable[ListRow]) -> Iterator[ListRow]:
    """Yields rows with the captions of those that follow and name the same image, as in lists with a row a caption.

    Rows that differ in more than their captions stay rows of their own.
    """
    same: list[ListRow] = []
    for row in rows:
        if same and not (row.url and row.url == same[0].url and not row.reject and _beyond(row) == _beyond(same[0])):
            yield _joined(same)
            same = []
        same.append(row)
        if len(same) == MOST_JOINED:
            same = [_joined(same)]
    if same:
        yield _joined(same)


def _joined(rows: list[ListRow]) -> ListRow:
    """Returns the first row with the captions of all, each once, within MAX_CAPTIONS."""
    first, *others = rows
    captions = dict.fromkeys(first.captions)
    room = MAX_CAPTIONS - sum(map(len, first.captions))
    for caption in (caption for row in others for caption in row.captions):
        if len(caption) <= room and caption not in captions:
            captions[caption] = None
            room -= len(caption)
    return replace(first, captions=tuple(captions)) if others else first


def _agreed(row: ListRow) -> tuple[str, ...]:
    """Returns what rows agree in whose captions are joined."""
    return comparable(row.url), *_beyond(row)


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
            "%s: %s with an image that an earlier row names, whose captions are left out: rows are merged that differ "
            "in nothing else, within one list",
            what,
            counted(again, "row"),
        )
