"""Finds the references of a list that an earlier row has too, by 64 bits of hash, in memory.

Cutting a list takes some 40 bytes a row, and each row of the lists before it 8. Among a billion rows two references
share a hash with a chance of 3 percent, which would cost the later one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

HASH = np.dtype("<u8")
_NO_HASH = 0  # the hash of no reference
Hashes: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint64]]"


@dataclass(frozen=True)
class Judged:
    """Says what became of rows, in order, and which hashes were not seen before.

    ``duplicate`` [n] is true where an earlier row has the reference; ``fresh`` is sorted.
    """

    duplicate: np.ndarray[tuple[int], np.dtype[np.bool_]]
    fresh: Hashes


class SeenReferences:
    """Keeps the hashes of all references so far."""

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
    return (
        int.from_bytes(hashlib.blake2b(reference.encode(), digest_size=8).digest(), "little") if reference else _NO_HASH
    )
