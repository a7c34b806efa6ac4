"""The records of a list: its shards, and segments of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from pipeline.graph.artifacts import SEGMENTS
from pipeline.ledger import StoredLedger
from pipeline.store.names import Digest
from pipeline.store.records import Count, Record

VERSION = 1
LAYOUT = 12  # of the records of segments, which no key counts
SEGMENT_SHARDS = 100_000  # shard numbers a segment may use: number = segment * SEGMENT_SHARDS + place


@dataclass(frozen=True)
class SourceShard:
    """Holds one shard of the list.

    Attributes:
        image_key: Key of the number and the references.
        caption_key: Key of the captions.
        held_out: Rows of the validation and the test split.
        captioned: Rows with a caption.
        lengths: Rows by the length of their first caption in characters, rounded up to hundreds.
        refs: Blob of the references, "" before they are stored.
        captions: Blob of the captions, "" before they are stored.
        versions: Blob of the versions with which its images were first seen (see versions.py), None for none.
    """

    number: Count
    image_key: Digest
    caption_key: Digest
    ledger: StoredLedger
    held_out: Mapping[str, Count] = field(default_factory=dict)
    captioned: Count = 0
    lengths: Mapping[str, Count] = field(default_factory=dict)
    refs: Digest = ""
    captions: Digest = ""
    versions: Digest | None = None


@dataclass(frozen=True)
class Segment(Record):
    """Holds a list as it is stored, or its first parts.

    Attributes:
        shards: Shards, the last of which is cut again when rows are added while it has room.
        hashes: Blobs of the hashes that no earlier segment has, each sorted.
        ways: Numbers of blobs of each run of hashes, which hold its ranges in order (see duplicates.ranges).
    """

    shards: list[SourceShard]
    hashes: list[Digest]
    ways: list[Count] = field(default_factory=list)

    @property
    def tables(self) -> list[str]:
        """Returns the blobs of the references and captions of all shards."""
        return [blob for shard in self.shards for blob in (shard.refs, shard.captions)]

    @property
    def named(self) -> list[str]:
        return [*self.tables, *self.hashes, *(shard.versions for shard in self.shards if shard.versions)]

    @property
    def runs(self) -> list[list[str]]:
        """Returns the blobs of each run of hashes; without ``ways`` each blob is a run."""
        ends = [0, *accumulate(self.ways or [1] * len(self.hashes))]
        return [self.hashes[low:high] for low, high in pairwise(ends)]

    def check(self, path: str) -> None:
        if not all(self.tables):
            raise ValueError("shards: one of them has no tables")
        if self.ways and sum(self.ways) != len(self.hashes):
            raise ValueError("ways: they are not the numbers of blobs of hashes")


def segment_path(name: str) -> str:
    """Returns the path of a segment's record."""
    return f"{SEGMENTS}{name}.json"


def segment_of(number: int) -> int:
    """Returns the segment of a shard."""
    return number // SEGMENT_SHARDS


def row_key(number: int, place: int) -> str:
    """Returns the key of a row as img2dataset spells it: 8 digits for its shard and 4 for its place in it."""
    return f"{number:08d}{place:04d}"


def shard_of(key: str) -> int:
    """Returns the shard of a row, from its key."""
    return int(key[:-4])
