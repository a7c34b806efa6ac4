"""Cuts the user's list into shards that never move.

A list is an ordered sequence of segments (files, folders, tars, or drawings), each cut in its own order into
shards of N rows. Appending a segment, or rows at the end of the last one, leaves every full shard as it was. A row that
is taken out leaves its shard shorter; one to be forgotten leaves an empty place.

A source shard has two keys: one over its number and image references, one over its captions, so that new captions
never download an image again. The first one also counts that an image was replaced, or is to be tried again.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate, islice
from typing import Any

import numpy as np

from pipeline.data.source.cutter import LENGTHS, SegmentCutter, ShardCutter
from pipeline.data.source.duplicates import HASH, SeenReferences, warn_of_captions
from pipeline.data.source.journal import EMPTY, ListJournal, read_journal
from pipeline.data.source.known_rows import MOST_ROWS, shards_of_last_run
from pipeline.data.source.lists import PartReader, check_unchanged, no_rows, parts_of, source_at, unread
from pipeline.data.source.passes import HERE, ListedPart, ListWorkers, cut_in_tasks, divide, read_in_tasks
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
from pipeline.settings import ShardSettings
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.store.records import digest, peek_record, read_blob, read_record

MOST_STORED = 64 << 20  # rows whose hashes one process copies: 64 bits each
CAPTIONED = "captioned"  # how a shard of captions counts its rows that have one
log = logging.getLogger("unclip")


@dataclass(frozen=True)
class Scan:
    """Holds all shards of a list, with the names of its segments, and has the two source keys.

    Attributes:
        shards: All its shards.
        segments: Names of its segments.
        unstored: Number of rows that a scan which writes has to read again.
    """

    shards: list[SourceShard] = field(default_factory=list)
    segments: list[str] = field(default_factory=list)
    unstored: int = 0

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


def scan(
    recipe: SourceRecipe,
    store: Store,
    write: bool,
    journal: ListJournal = EMPTY,
    project: str = "",
    workers: ListWorkers = HERE,
) -> Scan:
    """Cuts the list into shards, which ``write`` stores, and reads of it what is not stored yet.

    A segment that was cut with the same decisions about its rows is not read again, and of one of many files only those
    behind the ones that it had. Rows that the last run of the ``project`` had stay in their shards (see known_rows).
    References of what is read are compared with the stored hashes of all rows before it. Files that are too much for
    one task, or behind too many rows for it, are read by ``workers`` in passes, which meet in the store: then shards
    are stored in any case.

    Raises:
        UserError: for a list that is missing, unreadable or empty, or lacks a column.
        CorruptObject: for a damaged segment.
        OtherFormat: for a store of another version, if there is anything to write.
    """
    columns = [recipe.image_column, recipe.caption_column, recipe.group_column, recipe.split_column, recipe.hash_column]
    reading = [*columns, recipe.encoding, recipe.image_folder, recipe.caption_lines]
    decided = [sorted(journal.forgotten), *([journal.retries] if journal.retries else [])]
    cut = [recipe.shard_rows, recipe.validation, recipe.test, recipe.roots, digest(decided)]
    names: list[str] = []
    lists: list[_List] = []
    for index, path in enumerate(recipe.paths):
        parts = []
        name = names[-1] if names else ""
        for part in parts_of(path):
            version = part.fingerprint()
            name = digest(["segment", LAYOUT, name, version, reading, *cut])
            parts.append(ListedPart(part, version, name))
        if not parts:
            raise no_rows(path, recipe)
        names.append(name)
        segment, stored = _stored(store, [part.name for part in parts])
        earlier = shards_of_last_run(store, project, index, recipe.shard_rows) if stored < len(parts) else []
        lists.append(_List(path, parts, stored, segment, earlier))
    before = accumulate(len(each.segment.shards) * recipe.shard_rows for each in lists)
    write = write or any(each.in_passes(rows) for each, rows in zip(lists, before, strict=True))
    if write and any(each.todo for each in lists):
        for entry in islice(store.list(SEGMENTS), 1):
            peek_record(store, entry.path, Segment)  # into a store of another version nothing is written
    cutter = partial(
        ShardCutter, recipe, journal.forgotten, Retries(store, journal.retries), ImageVersions(), store, write
    )
    shards, others = _cut(lists, cutter, [reading, cut], workers)
    stored = sum(shard.ledger.rows for each in lists for shard in each.segment.shards)
    unstored = 0 if write else sum(shard.ledger.rows for shard in shards) - stored
    return Scan(shards, names + others, unstored)


@dataclass(frozen=True)
class _List:
    """Holds a list.

    Attributes:
        path: Path of the list.
        parts: All its parts.
        stored: Number of those that are stored.
        segment: Segment of these.
        earlier: Shards that the last run had, if there are parts to read.
    """

    path: str
    parts: Sequence[ListedPart]
    stored: int
    segment: Segment
    earlier: Sequence[SourceShard]

    @property
    def todo(self) -> Sequence[ListedPart]:
        return self.parts[self.stored :]

    @cached_property
    def tasks(self) -> Sequence[Sequence[ListedPart]]:
        return divide(self.todo)

    def in_passes(self, before: int) -> bool:
        """Returns whether there is too much for one task: to read, or of the rows ``before`` that, about."""
        return len(self.tasks) > 1 or (bool(self.tasks) and before > MOST_STORED)

    def readers(self, workers: ListWorkers) -> ListWorkers:
        """Returns the workers; this process where those on other machines would not find the list by its path."""
        if os.environ.get("RAY_ADDRESS") and not source_at(self.path).everywhere:
            return replace(workers, settings=HERE.settings)
        return workers


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


def _cut(
    lists: Sequence[_List], cutter: Callable[[int], ShardCutter], how: Any, workers: ListWorkers
) -> tuple[list[SourceShard], list[str]]:
    """Returns the shards of lists, and names of segments of which images were replaced.

    Reads the parts that are not stored; raises UserError as ``scan`` does.
    """
    shards: list[SourceShard] = []
    others: list[str] = []
    runs: list[list[str]] = []  # of the hashes of all rows so far, as far as they are stored
    unseen: list[str] = []  # blobs
    with SeenReferences() as seen:
        for index, each in enumerate(lists):
            segment = each.segment
            runs += segment.runs
            unseen += segment.hashes
            if each.todo:
                made = cutter(index)
                say_once(unread(each.path, made.recipe))
                before = (len(shards) + len(segment.shards)) * made.recipe.shard_rows
                in_passes = made.write and each.in_passes(before)
                if in_passes:
                    read = read_in_tasks(each.readers(workers), each.path, each.tasks, how, made, bool(segment.shards))
                    cut = SegmentCutter(made, segment, each.earlier if read.total.rows <= MOST_ROWS else ())
                    found = read.total, cut_in_tasks(read, cut, runs, len(shards))
                else:
                    cut = SegmentCutter(made, segment, each.earlier)
                    for data in ordered_map(partial(read_blob, made.store), unseen):
                        seen.add(np.frombuffer(data, HASH))
                    unseen = []
                    found = _read_at_once(each, cut, seen)
                segment = _finished(each, cut, *found)
                new = segment.runs[len(each.segment.runs) :]
                runs += new
                unseen += [blob for run in new for blob in run] if in_passes else []
            if each.stored and not all(part.part.knows_images for part in each.parts):
                segment, current = cutter(index).current(segment, each.parts[-1].name)
                others += [current] if current != each.parts[-1].name else []
            shards += segment.shards
    return shards, others


def _read_at_once(each: _List, cutter: SegmentCutter, seen: SeenReferences) -> tuple[PartReader, int]:
    """Reads the parts of a list that are not stored as one task, and cuts their rows.

    Returns counts of the rows, and the number of those of images that an earlier row names whose captions no row took.
    """
    recipe, reference = cutter.cut.recipe, cutter.reference
    with PartReader(each.path, recipe) as reader, ProgressLine() as line, RowSpool() as spool:

        def read(part: ListPart) -> Iterator[ListRow]:
            for number, row in enumerate(islice(reader.read(part), SEGMENT_SHARDS * recipe.shard_rows + 1)):
                if number % 1000 == 0:
                    line.show(lambda: f"source {each.path}: {counted(reader.rows, 'row')} read")
                yield row

        for listed in each.todo:
            spool.add(read(listed.part), reference)
        for listed in each.todo:
            check_unchanged(listed.part, listed.version)
        reader.finish(others=cutter.place > 0)
        cutter.add(spool, seen)
    return reader, spool.left


def _finished(each: _List, cutter: SegmentCutter, reader: PartReader, left: int) -> Segment:
    """Returns the segment of a list that was read, and warns of what it lacks. Raises UserError without a row."""
    if not cutter.place:
        raise no_rows(each.path, cutter.cut.recipe)
    what = f"source {each.path}"
    if reader.flawed:
        rows = counted(reader.flawed, "row")
        log.warning("%s: %s cannot be read and will be left out; the first: %s", what, rows, reader.flaw)
    warn_of_captions(what, left, reader.rows)
    return cutter.keep(each.parts[-1].name)


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


SOURCE = Stage(
    "source",
    VERSION,
    SourceRecipe,
    (),
    run_source,
    "source",
    settings=ShardSettings,
    counts_list=True,
    row_seconds=lambda *_: 32e-6,
)
CAPTIONS = Stage(
    "captions", VERSION, SourceRecipe, (), run_captions, "source", section="source", row_seconds=lambda *_: 1e-6
)
