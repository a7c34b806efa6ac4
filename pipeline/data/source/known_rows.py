"""Finds the rows of a list in the shards that an earlier version of it had, where they stay.

So a row that is taken out changes its own shard alone, and one that is put in between others the last one alone.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import numpy as np

from pipeline.data.fetch.references import comparable
from pipeline.data.source.duplicates import HASH, Hashes, hashes_of
from pipeline.data.source.rows import counted_of
from pipeline.data.source.segments import SEGMENT_SHARDS, Segment, SourceShard, segment_of, segment_path
from pipeline.data.source.source import ListRow
from pipeline.data.source.versions import UNKNOWN, replaced_by
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import read_table
from pipeline.graph.runs import runs_of_lists
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.store.records import read_blob, read_record

MOST_ROWS = 4 << 20  # of a list, that are compared with those of an earlier one: 64 bits each
MOST_WAITING = 1 << 18  # rows that are in memory because others of their shard come later
RUNS = 20  # of which the last one that has stored its list is looked for
NEW = -1  # in place of the number of an earlier row
_FORGOTTEN = 1  # in place of the hash of a reference that is forgotten
Places: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"
log = logging.getLogger("unclip")


def shards_of_last_run(store: Store, project: str, index: int, shard_rows: int) -> list[SourceShard]:
    """Returns the shards of a segment as the last run of a project that stored it had them; none of another size."""
    for run in islice(runs_of_lists(store, project), RUNS) if project else ():
        recipe = run.stages["source"].recipe if "source" in run.stages else {}
        # Behind those of the lists are segments that say which of their images were replaced.
        for name in (*run.segments[len(recipe.get("paths", ())) :], *run.segments[index : index + 1]):
            segment = read_record(store, segment_path(name), Segment)
            if segment and segment.shards and segment_of(segment.shards[0].number) == index:
                return segment.shards if recipe.get("shard_rows") == shard_rows else []
    return []


class SeenVersions:
    """Holds the versions with which images were first and last seen, by the hashes of their references."""

    def __init__(self, hashes: Hashes, first: Hashes, last: Hashes):
        known = first != UNKNOWN
        self._hashes, place = np.unique(hashes[known], return_index=True)
        self._first, self._last = first[known][place], last[known][place]

    @staticmethod
    def of_shard(store: Store, shard: SourceShard) -> SeenVersions:
        """Returns those of a stored shard."""
        return SeenVersions(*_rows_of(store, shard))

    def of(self, references: Sequence[str], seen: Hashes) -> tuple[Hashes, Hashes]:
        """Returns the first and the last version of each image, [count] each.

        What is ``seen`` now is the last one, and of a new image the first one, too; one that cannot be looked at is as
        it was.
        """
        if not len(self._hashes):
            return seen, seen
        hashes = hashes_of(map(comparable, references))
        place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        known = self._hashes[place] == hashes
        first = np.where(known, self._first[place], seen)
        return first, np.where(known & (seen == UNKNOWN), self._last[place], seen)


NONE_SEEN = SeenVersions(*(np.empty(0, HASH) for _ in range(3)))


@dataclass(frozen=True)
class Placed:
    """Says where the rows of a list go.

    Attributes:
        rows: Number of the earlier row that each row is, up to the last one that is known; NEW for others.
        shards: Place in the segment of each known row's shard; NEW for other rows.
        counts: Rows of each shard that are still there, by its place.
    """

    rows: Sequence[int]
    shards: Sequence[int]
    counts: dict[int, int]


class KnownRows:
    """Holds the rows of a segment as they were cut before, by the hashes of their references.

    Args:
        store: Store of the segment.
        shards: Shards of the segment in order.
        begun: The one that is read already, and takes further rows.
        shard_rows: Rows of a full shard.
    """

    def __init__(self, store: Store, shards: Sequence[SourceShard], begun: SourceShard | None, shard_rows: int):
        if sum(shard.ledger.rows for shard in shards) > MOST_ROWS:
            shards = ()
        nothing = (np.empty(0, HASH),) * 3
        there = _rows_of(store, begun) if begun else nothing
        try:
            found = [nothing, *ordered_map(partial(_rows_of, store), shards)]
        except CorruptObject as e:  # or garbage that was collected
            log.warning("the list is cut as a new one: of an earlier one, %s", e)
            shards, found = (), [nothing]
        self.versions = SeenVersions(*(np.concatenate(each) for each in zip(there, *found, strict=True)))
        hashes = np.concatenate([each for each, _, _ in found])
        numbers = np.array([shard.number % SEGMENT_SHARDS for shard in shards], np.int64)
        places = np.repeat(numbers, [len(each) for each, _, _ in found[1:]])
        again = _matched(hashes, there[0], np.zeros(len(there[0]), np.bool_))
        self._hashes, self._places = (np.delete(each, again[again != NEW]) for each in (hashes, places))
        self._shards, self._shard_rows, self._there = shards, shard_rows, len(there[0])
        self._listed, self._forgotten = array("Q"), array("B")

    def __len__(self) -> int:
        """Returns how many rows are to be found."""
        return len(self._hashes)

    def noting(self, reference: Callable[[ListRow], str], forgotten: Callable[[str], bool]) -> Callable[[ListRow], str]:
        """Returns ``reference``, which notes of each row of the list that it is asked about who it is."""
        if not self:
            return reference

        def noted(row: ListRow) -> str:
            if len(self._listed) <= MOST_ROWS:
                self._listed.extend(hashes_of([comparable(row.url)]).tolist())
                self._forgotten.append(forgotten(row.url))
            return reference(row)

        return noted

    def places(self, first: int) -> Placed | None:
        """Returns where the noted rows go. The first shard that takes any of them is at the place ``first``.

        None stands for rows that are cut as those of a new list: most of the earlier ones are gone, or they come in
        an order in which too many would wait for others.
        """
        if not self or not self._listed or len(self._listed) > MOST_ROWS:
            return None
        rows = _matched(self._hashes, np.array(self._listed, HASH), np.array(self._forgotten, np.bool_))
        self._hashes = self._hashes[:0]  # they are placed once
        known = np.flatnonzero(rows != NEW)
        last = self._shards[-1]
        room = (last.number % SEGMENT_SHARDS - first) * self._shard_rows + last.ledger.rows
        if not len(known) or 2 * (len(known) + self._there) < room:
            return None
        rows = rows[: known[-1] + 1]
        places = np.where(rows == NEW, NEW, self._places[rows])
        counts = np.bincount(places[known])
        if (
            self._there + counts[first : first + 1].sum() > self._shard_rows
        ):  # it has rows that the earlier list had not
            return None
        ends = np.zeros(len(counts), np.int64)
        ends[places[known]] = known  # the last of those that are assigned counts
        done = np.zeros(len(rows), np.int64)
        done[ends[counts > 0]] = counts[counts > 0]
        if (np.arange(1, len(rows) + 1) - np.cumsum(done)).max() > MOST_WAITING:
            return None
        return Placed(rows.tolist(), places.tolist(), {place: n for place, n in enumerate(counts.tolist()) if n})


def _rows_of(store: Store, shard: SourceShard) -> tuple[Hashes, Hashes, Hashes]:
    """Returns the hashes of the references of a shard, and the first and last versions of its images, [rows] each."""
    table = read_table(store, shard.refs)
    hashes = hashes_of(comparable(url) for url in table["url"].to_pylist())
    hashes[np.array([reject == "forgotten" for reject in table["reject"].to_pylist()], np.bool_)] = _FORGOTTEN
    if not shard.versions:
        return hashes, np.full(len(hashes), UNKNOWN, HASH), np.full(len(hashes), UNKNOWN, HASH)
    first = np.frombuffer(read_blob(store, shard.versions), HASH)
    last = [replaced_by(said) or version for said, version in zip(counted_of(table), first.tolist(), strict=True)]
    return hashes, first, np.array(last, HASH)


def _matched(earlier: Hashes, listed: Hashes, forgotten: Any) -> Places:
    """Returns for each listed row the number of the earlier row that it is, NEW for none.

    Of rows with one reference the first is the first, and so on; rows without one count as such. A row that is
    forgotten is one that was there, or one that was forgotten before.
    """
    listed = np.where(forgotten & ~np.isin(listed, earlier), np.uint64(_FORGOTTEN), listed)
    order = np.argsort(earlier, kind="stable")
    known = earlier[order]
    by_hash = np.argsort(listed, kind="stable")
    ranks = np.empty(len(listed), np.int64)
    ranks[by_hash] = np.arange(len(listed)) - np.searchsorted(listed[by_hash], listed[by_hash])
    place = np.searchsorted(known, listed) + ranks
    within = np.flatnonzero(place < len(known))
    same = within[known[place[within]] == listed[within]]
    found = np.full(len(listed), NEW, np.int64)
    found[same] = order[place[same]]
    return found
