"""Cuts the user's list into shards that never move.

A list is an ordered sequence of segments (files, folders, tars, or drawings), each cut in its own order into
shards of N rows. Appending a segment, or rows at the end of the last one, leaves every full shard as it was. Rows to
be tried again are segments too; a row to be forgotten leaves an empty place.

A source shard has two keys: one over its number and image references, one over its captions, so that new captions
never download an image again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.fetch.references import comparable
from pipeline.data.source.duplicates import HASH, SeenReferences, warn_of_captions
from pipeline.data.source.journal import EMPTY, ListJournal, read_journal, reference_marks
from pipeline.data.source.lists import PartReader, check_unchanged, no_rows, parts_of, unread
from pipeline.data.source.recipe import FIRST_RETRY, SourceRecipe
from pipeline.data.source.rows import stored_rows, written_rows
from pipeline.data.source.source import ListPart, ListRow
from pipeline.data.source.spool import RowSpool
from pipeline.errors import UserError
from pipeline.graph.artifacts import (
    SEGMENTS,
    Artifact,
    Shard,
    publish_artifact,
    read_table,
    write_shard_table,
    write_table,
)
from pipeline.graph.stages import Context, Stage
from pipeline.ledger import Ledger, StoredLedger
from pipeline.progress import ProgressLine, counted, say_once
from pipeline.store import Store
from pipeline.store.names import Digest
from pipeline.store.parallel import ordered_map
from pipeline.store.records import Count, Record, create_record, digest, put_blob, read_blob, read_record

VERSION = 1
LAYOUT = 11  # of the records of segments, which no key counts
SEGMENT_SHARDS = 100_000  # shard numbers a segment may use: number = segment * SEGMENT_SHARDS + place
HASHES_A_BLOB = 1 << 20
ROWS_A_RECORD = 16 << 20  # of a list of many files, read before they are stored: what an interruption may cost
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
    """Holds a list as it is stored, or its first parts.

    Attributes:
        shards: Shards, the last of which is cut again when rows are added while it has room.
        hashes: Blobs of the hashes that no earlier segment has, each sorted.
    """

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
    """Cuts the list into shards, which ``write`` stores, and reads of it what is not stored yet.

    A segment that was cut with the same rows forgotten is not read again, and of one of many files only those behind
    the ones that it had. References of what is read are compared with the stored hashes of all rows before it.

    Raises:
        UserError: for a list that is missing, unreadable or empty, or lacks a column.
        CorruptObject: for a damaged segment.
    """
    shards: list[SourceShard] = []
    columns = [recipe.image_column, recipe.caption_column, recipe.group_column, recipe.split_column, recipe.hash_column]
    reading = [*columns, recipe.encoding, recipe.image_folder, recipe.caption_lines]
    cut = [recipe.shard_rows, recipe.validation, recipe.test, recipe.roots, digest(sorted(journal.forgotten))]
    names: list[str] = []
    cutter = partial(_Cutter, recipe, journal.forgotten, store, write)
    unseen: list[str] = []  # blobs
    with SeenReferences() as seen:
        for index, path in enumerate(recipe.paths):
            parts = []
            name = names[-1] if names else ""
            for part in parts_of(path):
                version = part.fingerprint()
                name = digest(["segment", LAYOUT, name, version, reading, *cut])
                parts.append(_Part(part, version, name))
            if not parts:
                raise no_rows(path, recipe)
            names.append(name)
            segment, stored = _stored(store, [part.name for part in parts])
            unseen += segment.hashes
            if stored < len(parts):
                for data in ordered_map(partial(read_blob, store), unseen):
                    seen.add(np.frombuffer(data, HASH))
                unseen = []
                segment = _extended(path, recipe, parts[stored:], cutter(index, segment), seen)
            shards += segment.shards
    for index, blob in enumerate(journal.retries, FIRST_RETRY):
        name = digest(["retry", LAYOUT, index, blob, *cut])
        names.append(name)
        segment, stored = _stored(store, [name])
        if not stored:
            retried = cutter(index, segment)
            # Not compared with the list: there they failed.
            with RowSpool() as spool, SeenReferences() as seen:
                spool.add(written_rows(read_blob(store, blob)), retried.reference)
                retried.add(spool, seen)
                warn_of_captions("rows to be tried again", spool.left, spool.count)
            segment = retried.keep(name)
        shards += segment.shards
    return Scan(shards, names)


@dataclass(frozen=True)
class _Part:
    """Holds a part of a list with its fingerprint, and the name of the segment of all parts up to this one."""

    part: ListPart
    version: Any
    name: str


def segment_path(name: str) -> str:
    """Returns the path of a segment's record."""
    return f"{SEGMENTS}{name}.json"


def _stored(store: Store, names: Sequence[str]) -> tuple[Segment, int]:
    """Returns the stored segment of the most parts, and their number; ``names`` are those of one part, of two, ..."""
    there: set[str] | None = None
    for count in range(len(names), 0, -1):
        path = segment_path(names[count - 1])
        if (there is None or path in there) and (segment := read_record(store, path, Segment)):
            return segment, count
        if there is None and count > 1:
            there = {entry.path for entry in store.list(SEGMENTS)}
    return Segment([], []), 0


def _extended(
    path: str, recipe: SourceRecipe, parts: Sequence[_Part], cutter: _Cutter, seen: SeenReferences
) -> Segment:
    """Reads the parts of a list that are not stored, and returns its segment. Raises UserError as ``scan`` does."""
    what = f"source {path}"
    say_once(unread(path, recipe))
    left, done, others = 0, 0, not cutter.empty
    with PartReader(path, recipe) as reader, ProgressLine() as line:

        def read(part: ListPart) -> Iterator[ListRow]:
            for number, row in enumerate(islice(reader.read(part), SEGMENT_SHARDS * recipe.shard_rows + 1)):
                if number % 1000 == 0:
                    line.show(lambda: f"{what}: {counted(reader.rows, 'row')} read, part {done:,} of {len(parts):,}")
                yield row

        while (first := done) < len(parts):
            if done:
                cutter.keep(parts[done - 1].name)
            with RowSpool() as spool:
                while done < len(parts) and spool.count < ROWS_A_RECORD:
                    done += 1
                    spool.add(read(parts[done - 1].part), cutter.reference)
                for each in parts[first:done]:
                    check_unchanged(each.part, each.version)
                if done == len(parts):
                    reader.finish(others)
                cutter.add(spool, seen)
                left += spool.left
        if cutter.empty:
            raise no_rows(path, recipe)
    if reader.flawed:
        rows = counted(reader.flawed, "row")
        log.warning("%s: %s cannot be read and will be left out; the first: %s", what, rows, reader.flaw)
    warn_of_captions(what, left, reader.rows)
    return cutter.keep(parts[-1].name)


class _Cutter:
    """Cuts rows behind those of a segment into shards, none of which holds a reference that ``forgotten`` marks."""

    def __init__(
        self, recipe: SourceRecipe, forgotten: frozenset[str], store: Store, write: bool, index: int, segment: Segment
    ):
        self._recipe, self._forgotten, self._store, self._write = recipe, forgotten, store, write
        self._index, self._shards, self._hashes = index, list(segment.shards), list(segment.hashes)
        self._open: list[tuple[ListRow, bool]] = []  # rows of the last shard, each with whether it is a duplicate
        if self._shards and self._shards[-1].ledger.rows < recipe.shard_rows:
            last = self._shards.pop()
            rows = stored_rows(*(read_table(store, blob) for blob in (last.refs, last.captions)))
            self._open = [(row, False) for row in rows]  # a duplicate is rejected as one

    @property
    def empty(self) -> bool:
        return not (self._shards or self._open)

    def add(self, spool: RowSpool, seen: SeenReferences) -> None:
        """Cuts the rows of a spool. Those that do not fill a shard wait for more."""
        judged = seen.judge(spool.hashes())
        for each in spool.judged(judged.duplicate):
            self._open.append(each)
            if len(self._open) == self._recipe.shard_rows:
                self._shards.append(self._shard())
                self._open = []
        if self._write and self._index < FIRST_RETRY:
            parts = range(0, len(judged.fresh), HASHES_A_BLOB)
            self._hashes += [put_blob(self._store, judged.fresh[i : i + HASHES_A_BLOB].tobytes()) for i in parts]

    def keep(self, name: str) -> Segment:
        """Returns the segment of all rows so far, and stores it under this name."""
        segment = Segment([*self._shards, *([self._shard()] if self._open else [])], list(self._hashes))
        if self._write and segment.shards:
            create_record(self._store, segment_path(name), segment)
        return segment

    def reference(self, row: ListRow) -> str:
        """Returns the reference of a row as it counts for duplicates.

        Rows that are forgotten or cannot be read have none, nor do rows that may not name their image, since another
        list may.
        """
        return "" if row.reject or self._is_forgotten(row.url) else comparable(row.url)

    def _is_forgotten(self, url: str) -> bool:
        return bool(self._forgotten) and not self._forgotten.isdisjoint(reference_marks(url))

    def _shard(self) -> SourceShard:
        """Returns the shard of the rows that wait."""
        if len(self._shards) == SEGMENT_SHARDS:
            raise UserError(f"source: over {SEGMENT_SHARDS:,} shards in one segment; raise source.shard_rows")
        number = self._index * SEGMENT_SHARDS + len(self._shards)
        refs, captions, rejects, named, held_out = [], [], [], [], Counter[str]()
        for row, again in self._open:
            reject = row.reject or ("no_reference" if not row.url else "duplicate_url" if again else None)
            # Of rows that are tried again, only those have no reference that were blanked.
            if self._is_forgotten(row.url) or (not row.url and self._index >= FIRST_RETRY):
                row, reject = ListRow("", ()), "forgotten"
            rejects.append(reject)
            captions.append(row.captions)
            named.append(bool(row.split))
            split = row.split or self._recipe.split_of(row.group or row.url)
            held_out[split] += reject is None and split != "train"
            refs.append((row.url, row.group, split, row.sha256, row.license, row.attribution, reject))
        blobs = self._put(number, refs, named, captions) if self._write else {}
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
        return {"refs": put_blob(self._store, write_table(table)), "captions": put_blob(self._store, write_table(said))}


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
        raise UserError("the list, its retries or its forgotten rows have changed since the plan; run again")
    shards = [
        Shard(s.number, getattr(s, key), s.ledger, {blob: getattr(s, blob)}, {CAPTIONED: s.captioned})
        for s in found.shards
    ]
    table, ledger = write_shard_table(ctx.store, shards)
    return publish_artifact(ctx.store, ctx.publishable(shard_table=table, ledger=ledger), seconds=0.0)


SOURCE = Stage("source", VERSION, SourceRecipe, (), run_source, "source", counts_list=True, row_seconds=32e-6)
CAPTIONS = Stage("captions", VERSION, SourceRecipe, (), run_captions, "source", section="source", row_seconds=1e-6)
