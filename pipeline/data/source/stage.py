"""Cuts the user's list into shards that never move.

A list is an ordered sequence of segments (files, folders, tars, or drawings), each cut in its own order into
shards of N rows. Appending a segment, or rows at the end of the last one, leaves every full shard as it was. Rows to
be tried again are segments too; a row to be forgotten leaves an empty place.

A source shard has two keys: one over its number and image references, one over its captions, so that new captions
never download an image again.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import pyarrow as pa

from pipeline.data.fetch.references import comparable
from pipeline.data.source.duplicates import HASH, LaterCaptions, SeenReferences, has_many, warn_of_captions
from pipeline.data.source.journal import EMPTY, ListJournal, read_journal, reference_marks
from pipeline.data.source.lists import fingerprint, no_rows, read_rows, unread
from pipeline.data.source.recipe import FIRST_RETRY, SourceRecipe
from pipeline.data.source.rows import written_rows
from pipeline.data.source.source import ListRow
from pipeline.errors import UserError
from pipeline.graph.artifacts import (
    SEGMENTS,
    Artifact,
    Shard,
    publish_artifact,
    write_shard_table,
    write_table,
)
from pipeline.graph.stages import Context, Stage
from pipeline.ledger import Ledger, StoredLedger
from pipeline.progress import counted, say_once
from pipeline.store import Store
from pipeline.store.names import Digest
from pipeline.store.records import Count, Record, create_record, digest, put_blob, read_blob, read_record

VERSION = 1
LAYOUT = 11  # of the records of segments, which no key counts
SEGMENT_SHARDS = 100_000  # shard numbers a segment may use: number = segment * SEGMENT_SHARDS + place
HASHES_A_BLOB = 1 << 20
LENGTHS = 100  # characters between two counts of the lengths of captions
CAPTIONED = "captioned"  # how a shard of captions counts its rows that have one
LAST_SEGMENT = 999  # a shard's number has eight digits
log = logging.getLogger("unclip")


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


@dataclass(frozen=True)
class Scan:
    """Holds all shards of a list, with the names of its segments, and has the two source keys."""

    shards: list[SourceShard] = field(default_factory=list)
    segments: list[str] = field(default_factory=list)

    @property
    def keys(self) -> dict[str, str]:
        return {
            "source": digest(["source", VERSION, [s.image_key for s in self.shards]]),
            "captions": digest(["captions", VERSION, [s.caption_key for s in self.shards]]),
        }

    def captions_above(self, most: int) -> int:
        """Returns how many rows surely have a first caption of more than ``most`` characters; exact for hundreds."""
        return sum(n for s in self.shards for length, n in s.lengths.items() if int(length) - LENGTHS >= most)

    @property
    def rows(self) -> int:
        """Returns how many rows name an image and a caption."""
        return sum(shard.ledger.kept for shard in self.shards)

    @property
    def held_out(self) -> Mapping[str, int]:
        """Returns how many rows of the list are held out, by split, before any is fetched."""
        return sum((Counter(shard.held_out) for shard in self.shards), Counter[str]())


@dataclass(frozen=True)
class Segment(Record):
    """Holds a list as it is stored, with the blobs of the sorted hashes that no earlier segment has."""

    shards: list[SourceShard]
    hashes: list[Digest]

    @property
    def tables(self) -> list[str]:
        """Returns the blobs of the references and captions of all shards."""
        return [blob for shard in self.shards for blob in (shard.refs, shard.captions)]

    @property
    def named(self) -> list[str]:
        return [*self.tables, *self.hashes]

    def check(self, path: str) -> None:
        if not all(self.tables):
            raise ValueError("shards: one of them has no tables")


def scan(recipe: SourceRecipe, store: Store, write: bool, journal: ListJournal = EMPTY) -> Scan:
    """Reads the list and cuts it into shards, which ``write`` stores.

    A segment that was cut with the same rows forgotten is not read again. Of its references the hashes are read, once
    there is a new segment to be compared with them.

    Raises:
        UserError: for a list that is missing, unreadable or empty, or lacks a column.
        CorruptObject: for a damaged segment.
    """
    shards: list[SourceShard] = []
    columns = [recipe.image_column, recipe.caption_column, recipe.group_column, recipe.split_column, recipe.hash_column]
    reading = [*columns, recipe.encoding, recipe.image_folder, recipe.caption_lines]
    cut = [recipe.shard_rows, recipe.validation, recipe.test, recipe.roots, digest(sorted(journal.forgotten))]
    names: list[str] = []
    cutter = _Cutter(recipe, journal.forgotten, store, write)
    seen = SeenReferences()
    unseen: list[str] = []  # blobs
    for index, path in enumerate(recipe.paths):
        name = digest(["segment", LAYOUT, names[-1] if names else "", fingerprint(path), reading, *cut])
        names.append(name)
        segment = read_record(store, segment_path(name), Segment)
        if segment is None:
            for blob in unseen:
                seen.add(np.frombuffer(read_blob(store, blob), HASH))
            unseen = []
            say_once(unread(path, recipe))
            segment = cutter.cut(name, index, f"source {path}", partial(read_rows, path, recipe), seen)
            if not segment.shards:
                raise no_rows(path, recipe)
        else:
            unseen += segment.hashes
        shards += segment.shards
    for index, blob in enumerate(journal.retries, FIRST_RETRY):
        name = digest(["retry", LAYOUT, index, blob, *cut])
        names.append(name)
        segment = read_record(store, segment_path(name), Segment)
        if segment is None:
            retried = partial(written_rows, read_blob(store, blob))
            # Not compared with the list: there they failed.
            segment = cutter.cut(name, index, "rows to be tried again", retried, SeenReferences())
        shards += segment.shards
    return Scan(shards, names)


def segment_path(name: str) -> str:
    """Returns the path of a segment's record."""
    return f"{SEGMENTS}{name}.json"


@dataclass(frozen=True)
class _Cutter:
    """Cuts segments into shards, none of which may hold a reference whose mark is in ``forgotten``."""

    recipe: SourceRecipe
    forgotten: frozenset[str]
    store: Store
    write: bool

    def cut(
        self, name: str, segment: int, what: str, rows: Callable[[], Iterator[ListRow]], seen: SeenReferences
    ) -> Segment:
        """Reads rows twice: for their references and, once it is known which are duplicates, for shards.

        Where there are many duplicates, once in between for their captions.
        """
        judged = seen.judge(self.references(islice(rows(), SEGMENT_SHARDS * self.recipe.shard_rows + 1)))
        many = has_many(int(judged.duplicate.sum()), len(judged.duplicate))
        later = LaterCaptions(zip(rows(), judged.duplicate.tolist(), strict=False) if many else ())
        shards: list[SourceShard] = []
        rest, place = rows(), 0
        unread, flaw = 0, ""
        while block := list(islice(rest, self.recipe.shard_rows)):
            if len(shards) == SEGMENT_SHARDS:
                raise UserError(f"source: over {SEGMENT_SHARDS:,} shards in one segment; raise source.shard_rows")
            flags = judged.duplicate[place : place + len(block)].tolist()
            if len(flags) < len(block):
                break
            block = [row if again else later.join(row) for row, again in zip(block, flags, strict=True)]
            shards.append(self._shard(segment * SEGMENT_SHARDS + len(shards), block, flags))
            place += len(block)
            unread += sum(bool(row.flaw) for row in block)
            flaw = flaw or next((row.flaw for row in block if row.flaw), "")
        if block or place < len(judged.duplicate):
            raise UserError(f"{what}: changed while it was read; run again")
        if unread:
            log.warning("%s: %s cannot be read and will be left out; the first: %s", what, counted(unread, "row"), flaw)
        warn_of_captions(what, later.left, place)
        hashes = []
        if self.write and shards:
            if segment < FIRST_RETRY:
                parts = range(0, len(judged.fresh), HASHES_A_BLOB)
                hashes = [put_blob(self.store, judged.fresh[i : i + HASHES_A_BLOB].tobytes()) for i in parts]
            create_record(self.store, segment_path(name), Segment(shards, hashes))
        return Segment(shards, hashes)

    def references(self, rows: Iterator[ListRow]) -> Iterator[str]:
        """Yields references as they count for duplicates.

        Rows that are forgotten or cannot be read leave no hash, nor do rows that may not name their image, since
        another list may.
        """
        return ("" if row.reject or self._is_forgotten(row.url) else comparable(row.url) for row in rows)

    def _is_forgotten(self, url: str) -> bool:
        return bool(self.forgotten) and not self.forgotten.isdisjoint(reference_marks(url))

    def _shard(self, number: int, rows: list[ListRow], duplicate: Sequence[bool]) -> SourceShard:
        refs, captions, rejects, named, held_out = [], [], [], [], Counter[str]()
        for row, again in zip(rows, duplicate, strict=True):
            reject = row.reject or ("no_reference" if not row.url else "duplicate_url" if again else None)
            # Of rows that are tried again, only those have no reference that were blanked.
            if self._is_forgotten(row.url) or (not row.url and segment_of(number) >= FIRST_RETRY):
                row, reject = ListRow("", ()), "forgotten"
            rejects.append(reject)
            captions.append(row.captions)
            named.append(bool(row.split))
            split = row.split or split_by_hash(row.group or row.url, self.recipe.validation, self.recipe.test)
            held_out[split] += reject is None and split != "train"
            refs.append((row.url, row.group, split, row.sha256, row.license, row.attribution, reject))
        blobs = self._put(number, refs, named, captions) if self.write else {}
        return SourceShard(
            number,
            digest(["refs", VERSION, number, refs]),
            digest(["captions", VERSION, number, captions]),
            Ledger.count(rejects),
            dict(+held_out),
            sum(map(has_caption, captions)),
            _lengths(said[0] for said, lost in zip(captions, rejects, strict=True) if said and not lost),
            **blobs,
        )

    def _put(
        self,
        number: int,
        refs: Sequence[tuple[str | None, ...]],
        named: Sequence[bool],
        captions: Sequence[tuple[str, ...]],
    ) -> dict[str, str]:
        columns = ("url", "group", "split", "sha256", "license", "attribution", "reject")
        table = {name: pa.array([ref[i] for ref in refs], pa.string()) for i, name in enumerate(columns)}
        table["named"] = pa.array(named)  # whether the list names the split
        keys = pa.array([row_key(number, i) for i in range(len(refs))], pa.string())
        said = {"key": keys, "captions": pa.array(captions, pa.list_(pa.string()))}
        return {"refs": put_blob(self.store, write_table(table)), "captions": put_blob(self.store, write_table(said))}


def has_caption(captions: Sequence[str]) -> bool:
    """Returns whether one of a row's captions is more than white space."""
    return any(caption.strip() for caption in captions)


def _lengths(captions: Iterable[str]) -> dict[str, int]:
    """Counts captions by their length in characters, rounded up to a multiple of LENGTHS."""
    return dict(Counter(str(-(-len(caption) // LENGTHS) * LENGTHS) for caption in captions))


def segment_of(number: int) -> int:
    """Returns the segment of a shard."""
    return number // SEGMENT_SHARDS


def row_key(number: int, place: int) -> str:
    """Returns the key of a row as img2dataset spells it: 8 digits for its shard and 4 for its place in it."""
    return f"{number:08d}{place:04d}"


def shard_of(key: str) -> int:
    """Returns the shard of a row, from its key."""
    return int(key[:-4])


def hash_share(value: str) -> float:
    """Returns the place of a group or a reference in [0, 1], by which it is held out or not."""
    return int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big") / 2**64


def split_by_hash(value: str, validation: float, test: float) -> str:
    """Returns 'test', 'validation' or 'train', by the value alone: a split never moves."""
    share = hash_share(value)
    return "test" if share < test else "validation" if share < test + validation else "train"


# --- stages -----------------------------------------------------------------------------------------------------------


def run_source(ctx: Context) -> Artifact:
    """Stores the references of every shard."""
    return _publish(ctx, "refs", "image_key")


def run_captions(ctx: Context) -> Artifact:
    """Stores the captions of every shard."""
    return _publish(ctx, "captions", "caption_key")


def _publish(ctx: Context, blob: str, key: str) -> Artifact:
    found = scan(ctx.recipe, ctx.store, write=True, journal=read_journal(ctx.store, ctx.project))
    if found.keys[ctx.stage] != ctx.key:
        raise UserError("the list, or what is to be tried again or forgotten, has changed since the plan; run again")
    shards = [
        Shard(s.number, getattr(s, key), s.ledger, {blob: getattr(s, blob)}, {CAPTIONED: s.captioned})
        for s in found.shards
    ]
    table, ledger = write_shard_table(ctx.store, shards)
    return publish_artifact(ctx.store, ctx.publishable(shard_table=table, ledger=ledger), seconds=0.0)


SOURCE = Stage("source", VERSION, SourceRecipe, (), run_source, "source", counts_list=True, row_seconds=32e-6)
CAPTIONS = Stage("captions", VERSION, SourceRecipe, (), run_captions, "source", section="source", row_seconds=1e-6)
