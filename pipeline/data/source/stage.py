"""Cuts the user's list into shards that never move.

A list is an ordered sequence of segments (files, folders, tars, or drawings), each cut in its own order into
shards of N rows. Appending a segment, or rows at the end of the last one, leaves every full shard as it was. A row that
is taken out leaves its shard shorter; one to be forgotten leaves an empty place.

A source shard has two keys: one over its number and image references, one over its captions, so that new captions
never download an image again. The first one also counts that an image was replaced, or is to be tried again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from pipeline.data.source.cutter import LENGTHS, SegmentCutter, ShardCutter
from pipeline.data.source.duplicates import HASH, SeenReferences, warn_of_captions
from pipeline.data.source.journal import EMPTY, ListJournal, read_journal
from pipeline.data.source.known_rows import shards_of_last_run
from pipeline.data.source.lists import PartReader, check_unchanged, no_rows, parts_of, unread
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.retry import Retries
from pipeline.data.source.segments import LAYOUT, SEGMENT_SHARDS, VERSION, Segment, SourceShard, segment_path
from pipeline.data.source.source import ListPart, ListRow
from pipeline.data.source.spool import RowSpool
from pipeline.data.source.versions import ImageVersions
from pipeline.errors import UserError
from pipeline.graph.artifacts import SEGMENTS, Artifact, Shard, publish_artifact, write_shard_table
from pipeline.graph.stages import Context, Stage
from pipeline.progress import ProgressLine, counted, say_once
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.store.records import digest, read_blob, read_record

ROWS_A_RECORD = 16 << 20  # of a list of many files, read before they are stored: what an interruption may cost
CAPTIONED = "captioned"  # how a shard of captions counts its rows that have one
log = logging.getLogger("unclip")


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


def scan(recipe: SourceRecipe, store: Store, write: bool, journal: ListJournal = EMPTY, project: str = "") -> Scan:
    """Cuts the list into shards, which ``write`` stores, and reads of it what is not stored yet.

    A segment that was cut with the same decisions about its rows is not read again, and of one of many files only those
    behind the ones that it had. Rows that the last run of the ``project`` had stay in their shards (see known_rows).
    References of what is read are compared with the stored hashes of all rows before it.

    Raises:
        UserError: for a list that is missing, unreadable or empty, or lacks a column.
        CorruptObject: for a damaged segment.
    """
    shards: list[SourceShard] = []
    columns = [recipe.image_column, recipe.caption_column, recipe.group_column, recipe.split_column, recipe.hash_column]
    reading = [*columns, recipe.encoding, recipe.image_folder, recipe.caption_lines]
    decided = [sorted(journal.forgotten), *([journal.retries] if journal.retries else [])]
    cut = [recipe.shard_rows, recipe.validation, recipe.test, recipe.roots, digest(decided)]
    names: list[str] = []
    others: list[str] = []  # of segments whose images were replaced
    cutter = partial(
        ShardCutter, recipe, journal.forgotten, Retries(store, journal.retries), ImageVersions(), store, write
    )
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
                earlier = shards_of_last_run(store, project, index, recipe.shard_rows)
                cut_again = SegmentCutter(cutter(index), segment, earlier)
                segment = _extended(path, recipe, parts[stored:], cut_again, seen)
            if stored and not all(part.part.knows_images for part in parts):
                segment, current = cutter(index).current(segment, name)
                others += [current] if current != name else []
            shards += segment.shards
    return Scan(shards, names + others)


@dataclass(frozen=True)
class _Part:
    """Holds a part of a list with its fingerprint, and the name of the segment of all parts up to this one."""

    part: ListPart
    version: Any
    name: str


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
    path: str, recipe: SourceRecipe, parts: Sequence[_Part], cutter: SegmentCutter, seen: SeenReferences
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

        reference = cutter.reference
        while (first := done) < len(parts):
            if done:
                cutter.keep(parts[done - 1].name)
            with RowSpool() as spool:
                while done < len(parts) and spool.count < ROWS_A_RECORD:
                    done += 1
                    spool.add(read(parts[done - 1].part), reference)
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


# --- stages -----------------------------------------------------------------------------------------------------------


def run_source(ctx: Context) -> Artifact:
    """Stores the references of every shard."""
    return _publish(ctx, "refs", "image_key")


def run_captions(ctx: Context) -> Artifact:
    """Stores the captions of every shard."""
    return _publish(ctx, "captions", "caption_key")


def _publish(ctx: Context, blob: str, key: str) -> Artifact:
    found = scan(ctx.recipe, ctx.store, write=True, journal=read_journal(ctx.store, ctx.project), project=ctx.project)
    if found.keys[ctx.stage] != ctx.key:
        raise UserError("the list, its images, retries or forgotten rows have changed since the plan; run again")
    shards = [
        Shard(s.number, getattr(s, key), s.ledger, {blob: getattr(s, blob)}, {CAPTIONED: s.captioned})
        for s in found.shards
    ]
    table, ledger = write_shard_table(ctx.store, shards)
    return publish_artifact(ctx.store, ctx.publishable(shard_table=table, ledger=ledger), seconds=0.0)


SOURCE = Stage("source", VERSION, SourceRecipe, (), run_source, "source", counts_list=True, row_seconds=32e-6)
CAPTIONS = Stage("captions", VERSION, SourceRecipe, (), run_captions, "source", section="source", row_seconds=1e-6)
