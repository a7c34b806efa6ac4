"""An exchange of rows between two passes: every task of the first has rows for every task of the second.

A task of the first pass writes a pack: one blob with a piece for each partition, and every partition is a task of the
second. To read a piece of each pack for each partition would take packs times partitions requests: the square of the
rows. Many packs are therefore merged first, as an external sort merges its runs: a task reads neighbouring partitions
of some packs, a range of each, and writes them as one pack. Requests and objects then grow with the rows, times a
number of merges that is the logarithm of the number of packs. No row passes through the driver.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from safetensors.numpy import load, save

from pipeline.data.neighbours.blocks import pass_task, run_pass
from pipeline.graph.artifacts import Shard, ShardRow, read_table, write_shard_table
from pipeline.graph.packs import read_pieces, write_pack
from pipeline.graph.stages import Context
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.store.records import digest


@dataclass(frozen=True)
class Fan:
    """How packs are merged.

    Attributes:
        packs: Packs that a merge reads. The second merges, and all later ones, also cut partitions into as many parts.
        parts: Parts into which the first merges cut partitions. So every merge holds packs / parts of a pack in memory.
    """

    packs: int
    parts: int


@dataclass(frozen=True)
class Packs:
    """Packs between two passes.

    Attributes:
        runs: Packs of each run of neighbouring tasks, in the order of these tasks: [runs, packs of a run].
        bounds: Partitions with which the packs of a run begin and end, [packs of a run + 1].
    """

    runs: Sequence[Sequence[Shard]]
    bounds: Sequence[int]


def exchange(
    ctx: Context, written: Sequence[tuple[Sequence[Shard], int]], fan: Fan, title: str
) -> list[list[ShardRow]]:
    """Merges the packs of several exchanges, side by side, until each has no more than the larger number of ``fan``.

    Args:
        ctx: Context of the stage.
        written: Packs of each exchange, in the order of their rows, and the number of its partitions. A pack is the
            blob "pack" of a shard.
        fan: Sizes of a merge.
        title: Title of the progress line.

    Returns:
        Inputs for tasks: of each exchange and partition what ``read_columns`` reads.
    """
    held = [Packs([[pack] for pack in packs], [0, partitions]) for packs, partitions in written]
    while large := [i for i, packs in enumerate(held) if len(packs.runs) > max(fan.packs, fan.parts)]:
        tasks: list[ShardTask] = []
        ends = []
        for i in large:
            tasks += _merges(ctx, held[i], fan, len(tasks))
            ends.append(len(tasks))
        made = run_pass(ctx, MergePacks(ctx.store), tasks, title, "packs")
        for i, (start, end) in zip(large, pairwise([0, *ends]), strict=True):
            bounds = [*(cut for cuts in _finer(held[i], fan) for cut in cuts[:-1]), held[i].bounds[-1]]
            width = len(bounds) - 1
            held[i] = Packs([made[first : first + width] for first in range(start, end, width)], bounds)
    return [_partitions(ctx.store, packs) for packs in held]


def _finer(packs: Packs, fan: Fan) -> Iterator[list[int]]:
    """Yields, for each pack of a run, where those begin and end that a merge makes of it."""
    for low, high in pairwise(packs.bounds):
        parts = min(fan.parts if len(packs.bounds) == 2 else fan.packs, high - low)
        yield [low + (high - low) * part // parts for part in range(parts + 1)]


def _merges(ctx: Context, packs: Packs, fan: Fan, first: int) -> list[ShardTask]:
    """Makes the tasks of a merge, numbered from ``first``: of each new run in order, and in it by partition."""
    finer = list(_finer(packs, fan))
    together = [packs.runs[start : start + fan.packs] for start in range(0, len(packs.runs), fan.packs)]
    tables = iter(store_tables(ctx.store, [[run[i] for run in runs] for runs in together for i in range(len(finer))]))
    tasks: list[ShardTask] = []
    for _ in together:
        for cuts, table in zip(finer, tables, strict=False):
            for start, stop in pairwise(cuts):
                inputs = {"packs": pack_range(table, start - cuts[0], stop - cuts[0])}
                tasks.append(pass_task(ctx, first + len(tasks), "merge packs", inputs))
    return tasks


def _partitions(store: Store, packs: Packs) -> list[ShardRow]:
    tables = store_tables(store, [[run[i] for run in packs.runs] for i in range(len(packs.bounds) - 1)])
    ranges = zip(tables, pairwise(packs.bounds), strict=True)
    return [pack_range(table, i, i + 1) for table, (low, high) in ranges for i in range(high - low)]


def store_tables(store: Store, lists: Iterable[Sequence[Shard]]) -> list[str]:
    """Stores lists of packs, which tasks name: the names of packs in every task would be packs times partitions."""

    def put(packs: Sequence[Shard]) -> str:
        return write_shard_table(store, [replace(pack, number=i) for i, pack in enumerate(packs)])[0]

    return list(ordered_map(put, lists))


def pack_range(table: str, start: int, stop: int) -> ShardRow:
    """Returns partitions [start, stop) of listed packs, as an input of a task."""
    return ShardRow(0, digest([table, start, stop]), 0, 0, {"packs": table}, {"start": start, "stop": stop})


@dataclass(frozen=True)
class MergePacks:
    """Merges the same partitions of several "packs" into one pack."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        packs = list(read_packs(self.store, task.inputs["packs"]))
        return write_pack((_join(pieces) for pieces in zip(*packs, strict=True)), len(packs[0]))


def read_columns(store: Store, partition: ShardRow) -> dict[str, np.ndarray]:
    """Returns the rows of a partition in the order of the packs, as columns of one length; no column of no rows.

    Raises CorruptObject.
    """
    return concatenate(piece for [piece] in read_packs(store, partition))


def read_packs(store: Store, partitions: ShardRow) -> Iterator[list[bytes]]:
    """Yields the pieces of some partitions in each pack. Packs are read at once, as many as ``ordered_map`` does."""
    packs = read_table(store, partitions.blobs["packs"], ["blob.pack"])["blob.pack"].to_pylist()
    start, stop = partitions.counts["start"], partitions.counts["stop"]
    return ordered_map(lambda pack: read_pieces(store, pack, start, stop), packs)


def _join(pieces: Iterable[bytes]) -> bytes:
    there = [piece for piece in pieces if piece]
    return there[0] if len(there) == 1 else to_piece(concatenate(there))


def concatenate(pieces: Iterable[bytes]) -> dict[str, np.ndarray]:
    """Returns the rows of pieces, in their order, as columns of one length; no column of no rows."""
    tables = [load(piece) for piece in pieces if piece]
    # Popped, so that one column is in memory twice, and not all of them.
    return {name: np.concatenate([table.pop(name) for table in tables]) for name in sorted(tables[0])} if tables else {}


def to_piece(columns: Mapping[str, np.ndarray]) -> bytes:
    """Returns the piece of a pack that holds rows, as columns of one length; no bytes for no rows."""
    rows = max(map(len, columns.values()), default=0)
    return save({name: np.ascontiguousarray(column) for name, column in columns.items()}) if rows else b""
