"""Which rows of a list name an image that an earlier row names."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from pipeline.progress import counted

HASH = np.dtype("<u8")  # of a reference
_NO_HASH = 0  # of an empty reference
Hashes: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint64]]"
FEW, SHARE = 10, 0.05  # rows with captions that are left out, and of all rows: more are worth a word
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


def hashes_of(references: Iterable[str]) -> Hashes:
    """Returns the hashes of references, _NO_HASH for an empty one."""
    return np.fromiter(map(_hash, references), HASH)


def _hash(reference: str) -> int:
    hashed = hashlib.blake2b(reference.encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "little") if reference else _NO_HASH


def warn_of_captions(what: str, again: int, rows: int) -> None:
    """Says where many captions are left out, since an earlier row names their image: ``again`` of ``rows`` rows."""
    if again > max(FEW, SHARE * rows):
        log.warning(
            "%s: %s with an image that an earlier row names, whose captions are left out: sort the list by image, for "
            "rows of one image that stand together are merged",
            what,
            counted(again, "row"),
        )
