"""Cuts rows into the shards of a segment."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter

import numpy as np
import pyarrow as pa

from pipeline.data.fetch.references import comparable
from pipeline.data.source.duplicates import Hashes, SeenReferences, cut_ranges
from pipeline.data.source.journal import reference_marks
from pipeline.data.source.known_rows import NEW, NONE_SEEN, KnownRows, Placed, SeenVersions
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.retry import Retries
from pipeline.data.source.rows import stored_rows
from pipeline.data.source.segments import (
    LAYOUT,
    SEGMENT_SHARDS,
    VERSION,
    Segment,
    SourceShard,
    row_key,
    segment_path,
)
from pipeline.data.source.source import ListRow
from pipeline.data.source.spool import RowSpool
from pipeline.data.source.versions import ImageVersions, counted_as
from pipeline.errors import UserError
from pipeline.graph.artifacts import read_table, write_table
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.store.records import create_record, digest, put_blob

HASHES_A_BLOB = 1 << 20
LENGTHS = 100  # characters between two counts of the lengths of captions
JudgedRow = tuple[ListRow, bool]
"""A row, and whether it is a duplicate."""


@dataclass(frozen=True)
class ShardCutter:
    """Makes shards of a segment, by its number ``index``. None holds a reference that ``forgotten`` marks.

    ``write`` stores their tables.
    """

    recipe: SourceRecipe
    forgotten: frozenset[str]
    retries: Retries
    images: ImageVersions
    store: Store
    write: bool
    index: int
    versions: SeenVersions = NONE_SEEN

    def reference(self, row: ListRow) -> str:
        """Returns the reference of a row as it counts for duplicates.

        Rows that are forgotten or cannot be read have none, nor do rows that may not name their image, since another
        list may.
        """
        return "" if row.reject or self.is_forgotten(row.url) else comparable(row.url)

    def is_forgotten(self, url: str) -> bool:
        """Returns whether a reference is one that is forgotten."""
        return bool(self.forgotten) and not self.forgotten.isdisjoint(reference_marks(url))

    def shard(self, place: int, rows: Iterable[JudgedRow]) -> SourceShard:
        """Returns the shard at a place in the segment."""
        check_place(place)
        number = self.index * SEGMENT_SHARDS + place
        refs, captions, rejects, named, held_out = [], [], [], [], Counter[str]()
        for row, again in rows:
            reject = row.reject or ("no_reference" if not row.url else "duplicate_url" if again else None)
            if self.is_forgotten(row.url):
                row, reject = ListRow("", ()), "forgotten"
            rejects.append(reject)
            captions.append(row.captions)
            named.append(bool(row.split))
            split = row.split or self.recipe.split_of(row.group or row.url)
            held_out[split] += reject is None and split != "train"
            refs.append((row.url, row.group, split, row.sha256, row.license, row.attribution, reject))
        urls = ["" if reject else str(url) for url, *_, reject in refs]
        first, last = self.versions.of(urls, self.images.of(urls))
        counted = self._counted(urls, first, last)
        blobs = self._put(number, refs, counted, named, captions, first) if self.write else {}
        return SourceShard(
            number,
            digest(["refs", VERSION, number, refs, *([counted] if any(counted) else [])]),
            digest(["captions", VERSION, number, captions]),
            Ledger.count(rejects),
            dict(+held_out),
            sum(map(has_caption, captions)),
            _lengths(said[0] for said, lost in zip(captions, rejects, strict=True) if said and not lost),
            **blobs,
        )

    def current(self, segment: Segment, name: str) -> tuple[Segment, str]:
        """Returns a stored segment and its name, or where images of it were replaced the one that says so."""
        found = zip(segment.shards, ordered_map(self._replaced, segment.shards), strict=True)
        changed = {shard.number: now for shard, now in found if now}
        if not changed:
            return segment, name
        name = digest(["replaced", LAYOUT, name, sorted((number, now.image_key) for number, now in changed.items())])
        made = replace(segment, shards=[changed.get(shard.number, shard) for shard in segment.shards])
        return self.keep(made, name), name

    def keep(self, segment: Segment, name: str) -> Segment:
        """Returns a segment, and stores it under this name."""
        if self.write and segment.shards:
            return create_record(self.store, segment_path(name), segment)
        return segment

    def _counted(self, urls: Sequence[str], first: Hashes, last: Hashes) -> list[str]:
        found = zip(last.tolist(), (first != last).tolist(), self.retries.times(urls), strict=True)
        return [counted_as(version, replaced, tried) for version, replaced, tried in found]

    def _replaced(self, shard: SourceShard) -> SourceShard | None:
        """Returns a stored shard as it is now, None if none of its images was replaced since."""
        if not shard.versions:
            return None
        table = read_table(self.store, shard.refs, ["url", "reject"])
        rows = zip(table["url"].to_pylist(), table["reject"].to_pylist(), strict=True)
        urls = ["" if reject else url for url, reject in rows]
        versions = SeenVersions.of_shard(self.store, shard)
        seen = self.images.of(urls)
        if (versions.of(urls, seen)[1] == versions.of(urls, np.zeros_like(seen))[1]).all():
            return None
        return replace(self, versions=versions).shard(shard.number % SEGMENT_SHARDS, self.stored(shard))

    def stored(self, shard: SourceShard) -> list[JudgedRow]:
        """Returns the rows of a stored shard."""
        rows = stored_rows(*(read_table(self.store, blob) for blob in (shard.refs, shard.captions)))
        return [(row, False) for row in rows]  # a duplicate is rejected as one

    def _put(
        self,
        number: int,
        refs: Sequence[tuple[str | None, ...]],
        counted: Sequence[str],
        named: Sequence[bool],
        captions: Sequence[tuple[str, ...]],
        first: Hashes,
    ) -> dict[str, str]:
        columns = ("url", "group", "split", "sha256", "license", "attribution", "reject")
        table = {name: pa.array([ref[i] for ref in refs], pa.string()) for i, name in enumerate(columns)}
        table["named"] = pa.array(named)  # whether the list names the split
        if any(counted):
            table["counted"] = pa.array(counted, pa.string())
        keys = pa.array([row_key(number, i) for i in range(len(refs))], pa.string())
        said = {"key": keys, "captions": pa.array(captions, pa.list_(pa.string()))}
        blobs = {"refs": write_table(table), "captions": write_table(said)}
        if first.any():
            blobs["versions"] = first.tobytes()
        return {name: put_blob(self.store, data) for name, data in blobs.items()}


class SegmentCutter:
    """Cuts rows behind those of a segment. Those that do not fill a shard wait for more.

    Args:
        cut: Cutter of the segment's shards.
        segment: Segment, as far as it is stored.
        earlier: Shards of the whole segment as an earlier list had it: its rows stay in them.
    """

    def __init__(self, cut: ShardCutter, segment: Segment, earlier: Sequence[SourceShard] = ()):
        self._shards, self._runs = list(segment.shards), segment.runs
        self._place = self._shards[-1].number % SEGMENT_SHARDS + 1 if self._shards else 0  # of the next shard
        open_shard = None
        if self._shards and self._shards[-1].ledger.rows < cut.recipe.shard_rows:
            open_shard = self._shards.pop()
            self._place -= 1
        behind = [shard for shard in earlier if shard.number % SEGMENT_SHARDS >= self._place]
        self._known = KnownRows(cut.store, behind, open_shard, cut.recipe.shard_rows)
        self.cut = replace(cut, versions=self._known.versions)
        self._open = self.cut.stored(open_shard) if open_shard else []  # rows of the next shard

    @property
    def place(self) -> int:
        """Returns the place in the segment of the next row, as if all its shards were full."""
        return self._place * self.cut.recipe.shard_rows + len(self._open)

    @property
    def knows_rows(self) -> bool:
        """Returns whether there are rows of an earlier list to find."""
        return bool(self._known)

    @property
    def reference(self) -> Callable[[ListRow], str]:
        """Returns the function that a spool asks for the reference of each row."""
        return self._known.noting(self.cut.reference, self.cut.is_forgotten)

    def add(self, spool: RowSpool, seen: SeenReferences) -> None:
        """Cuts the rows of a spool, which were asked for their ``reference``."""
        self.expect(spool.count)
        judged = seen.judge(spool.hashes())
        self.settle(spool.judged(judged.duplicate))
        ways = -(-len(judged.fresh) // HASHES_A_BLOB)
        if ways and self.cut.write:
            self.keep_hashes([put_blob(self.cut.store, each.tobytes()) for each in cut_ranges(judged.fresh, ways)])

    def expect(self, rows: int) -> None:
        """Raises UserError where ``rows`` further rows take more shards than a segment may have."""
        check_place(-(-(self.place + rows) // self.cut.recipe.shard_rows) - 1)

    def settle(self, rows: Iterator[JudgedRow]) -> None:
        """Cuts all rows that were asked for their ``reference``, those of an earlier list into its shards."""
        placed = self._known.places(self._place)
        self.take(self._settled(placed, rows) if placed else rows)

    def take(self, rows: Iterable[JudgedRow]) -> None:
        """Cuts rows."""
        for each in rows:
            self._open.append(each)
            self._close()

    def take_shards(self, shards: Sequence[SourceShard]) -> None:
        """Appends full shards that were cut elsewhere. No row may be waiting."""
        if shards and (self._open or shards[0].number % SEGMENT_SHARDS != self._place):
            raise RuntimeError(f"shard {shards[0].number} does not follow shard {self._place} of its segment")
        self._shards += shards
        self._place += len(shards)

    def keep_hashes(self, blobs: Sequence[str]) -> None:
        """Appends a run of hashes, whose blobs hold its ranges."""
        self._runs.append(list(blobs))

    def _close(self) -> None:
        """Cuts the next shard if it is full."""
        if len(self._open) == self.cut.recipe.shard_rows:
            self._shards.append(self.cut.shard(self._place, self._open))
            self._place, self._open = self._place + 1, []

    def _settled(self, placed: Placed, rows: Iterator[JudgedRow]) -> Iterator[JudgedRow]:
        """Cuts the rows that an earlier list had into its shards, in its order; yields the others, behind them."""
        waiting: dict[int, list[tuple[int, JudgedRow]]] = defaultdict(list)
        new: list[JudgedRow] = []
        made: dict[int, SourceShard] = {}
        begun, first, last = self._open, self._place, max(placed.counts)
        self._open, self._place = [], last

        def rows_of(place: int) -> list[JudgedRow]:
            known = [row for _, row in sorted(waiting.pop(place, []), key=itemgetter(0))]
            return begun + known if place == first else known

        for number, place in zip(placed.rows, placed.shards, strict=True):
            row = next(rows)
            if number == NEW:
                new.append(row)
                continue
            waiting[place].append((number, row))
            if len(waiting[place]) == placed.counts[place] and place != last:
                made[place] = self.cut.shard(place, rows_of(place))
        if begun and first != last and first not in made:
            made[first] = self.cut.shard(first, begun)
        self._shards += [made[place] for place in sorted(made)]
        self._open = rows_of(last)
        self._close()
        yield from chain(new, rows)

    def keep(self, name: str) -> Segment:
        """Returns the segment of all rows so far, and stores it under this name."""
        last = [self.cut.shard(self._place, self._open)] if self._open else []
        hashes = [blob for run in self._runs for blob in run]
        return self.cut.keep(Segment([*self._shards, *last], hashes, [*map(len, self._runs)]), name)


def check_place(place: int) -> None:
    """Raises UserError for a place that no shard of a segment may have."""
    if place >= SEGMENT_SHARDS:
        raise UserError(f"source: over {SEGMENT_SHARDS:,} shards in one segment; raise source.shard_rows")


def has_caption(captions: Sequence[str]) -> bool:
    """Returns whether one of a row's captions is more than white space."""
    return any(caption.strip() for caption in captions)


def _lengths(captions: Iterable[str]) -> dict[str, int]:
    """Counts captions by their length in characters, rounded up to a multiple of LENGTHS."""
    return dict(Counter(str(-(-len(caption) // LENGTHS) * LENGTHS) for caption in captions))
