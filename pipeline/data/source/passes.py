"""Reads a list of many files on workers, in three passes, as one process would read it: the same rows, shards and keys.

The first pass reads files into spools (see ``spool``). The second compares the references of all spools, in the order
of the list, a range of hashes in each task, and so finds what an earlier row has. The third cuts each spool into
shards. A shard whose rows are in two spools is cut by the process that opens the list: it holds the rows of one shard,
and of all others the names. It also cuts a list among whose rows, which are few then, some of an earlier list are to
stay in their shards (see known_rows).
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from pipeline.data.source.cutter import JudgedRow, SegmentCutter, ShardCutter
from pipeline.data.source.duplicates import BUCKETS, HASH, SeenReferences, cut_ranges, mark_known, ranges, within_range
from pipeline.data.source.lists import PartReader, check_unchanged
from pipeline.data.source.segments import LAYOUT, SEGMENT_SHARDS, VERSION, SourceShard
from pipeline.data.source.source import ListPart, ListRow
from pipeline.data.source.spool import RowSpool, row_of, row_values
from pipeline.graph.artifacts import Shard
from pipeline.graph.packs import read_pieces, write_pack
from pipeline.graph.shards import run_shards
from pipeline.graph.stages import Context
from pipeline.graph.workers import ShardOutput, ShardTask, ShardWorker
from pipeline.ledger import Ledger
from pipeline.progress import say_once
from pipeline.settings import RaySettings, ShardSettings
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.store.records import digest, parse_object, read_blob

TASK_BYTES = 128 << 20  # of the files that a worker reads into one spool, if it is more than one
RANGE_HASHES = 8 << 20  # that a worker compares at once, about
_SHARDS = TypeAdapter(list[SourceShard])


@dataclass(frozen=True)
class ListWorkers:
    """Settings of the workers that read a list, and of the local Ray. By default this process is the worker."""

    settings: ShardSettings = field(default_factory=lambda: ShardSettings(workers=0))
    ray: RaySettings = field(default_factory=RaySettings)


HERE = ListWorkers()


@dataclass(frozen=True)
class ListedPart:
    """Holds a part of a list with its fingerprint, and the name of the segment of all parts up to this one."""

    part: ListPart
    version: Any
    name: str


def divide(parts: Sequence[ListedPart]) -> list[list[ListedPart]]:
    """Returns the parts of each task: one large part, or neighbouring small ones."""
    tasks: list[list[ListedPart]] = []
    size = TASK_BYTES
    for part in parts:
        if size >= TASK_BYTES or size + part.part.size > TASK_BYTES:
            tasks.append([])
            size = 0
        tasks[-1].append(part)
        size += part.part.size
    return tasks


@dataclass(frozen=True)
class ReadList:
    """Holds parts of a list as the first pass has read them.

    Attributes:
        ctx: Context of the passes.
        how: JSON values, as for ``read_in_tasks``.
        spools: Shard of each task.
        total: Counts of the rows.
    """

    ctx: Context
    how: Any
    spools: Sequence[Shard]
    total: PartReader


def read_in_tasks(
    workers: ListWorkers,
    path: str,
    tasks: Sequence[Sequence[ListedPart]],
    how: Any,
    cut: ShardCutter,
    others: bool,
) -> ReadList:
    """Reads parts of a list, those of each task on a worker.

    Args:
        workers: Workers that read.
        path: Path of the list.
        tasks: Parts of each task.
        how: JSON values that change with whatever decides how a part is read and its rows are cut.
        cut: Cutter of the segment's shards.
        others: True where the list has other rows, too.

    Raises:
        UserError: for a part that cannot be read, or a list in which no row has a caption.
    """
    store = cut.store
    ctx = Context(store, "source", VERSION, "", cut.recipe, workers.settings, {}, ray=workers.ray)
    keys = [digest(["read", LAYOUT, how, [each.version for each in parts]]) for parts in tasks]
    files = sum(map(len, tasks))
    spools = _run(ctx, ReadParts(path, cut, tasks), keys, "files", files, "reading")
    total = PartReader(path, cut.recipe)
    for shard in spools:
        note = json.loads(read_blob(store, shard.blobs["note"]))
        for line in note["said"]:
            say_once(line)
        total.add(shard.counts, note["flaw"])
    total.finish(others)
    return ReadList(ctx, how, spools, total)


def cut_in_tasks(read: ReadList, cutter: SegmentCutter, seen: Sequence[Sequence[str]], shards_before: int) -> int:
    """Cuts rows that were read behind those of their segment.

    Args:
        read: Rows.
        cutter: Cutter of the segment, which stores what it cuts.
        seen: Runs of hashes of all rows before these.
        shards_before: Shards of the lists before this one.

    Returns:
        Number of rows of images that an earlier row names whose captions no row took.

    Raises:
        UserError: for more rows than a segment may have.
        CorruptObject: for a damaged blob of an earlier segment.
    """
    cut, ctx, rows = cutter.cut, read.ctx, read.total.rows
    cutter.expect(rows)
    ways = min(BUCKETS, -(-(shards_before * cut.recipe.shard_rows + cutter.place + rows) // RANGE_HASHES) or 1)
    packs = [shard.blobs["pack"] for shard in read.spools]
    keys = [digest(["compare", LAYOUT, packs, seen, ways, number]) for number in range(ways)]
    judged = _run(ctx, CompareReferences(cut.store, packs, seen, ways), keys, "ranges", ways, "duplicates")
    cutter.keep_hashes([shard.blobs["hashes"] for shard in judged])
    again = [shard.blobs["pack"] for shard in judged]
    *firsts, _ = accumulate((shard.counts["rows"] for shard in read.spools), initial=cutter.place)
    blobs = [shard.blobs["rows"] for shard in read.spools]
    worker = CutSpool(cut, list(zip(blobs, firsts, strict=True)), again)
    return _settle(worker, cutter) if cutter.knows_rows else _cut(worker, cutter, read)


def _settle(worker: CutSpool, cutter: SegmentCutter) -> int:
    """Cuts spools here, the rows of an earlier list into its shards; returns what ``cut_in_tasks`` does."""
    for blob, _ in worker.spools:
        with RowSpool.load(worker.cut.store, blob) as spool:
            deque(map(cutter.reference, spool.rows()), maxlen=0)
    left = 0

    def rows() -> Iterator[JudgedRow]:
        nonlocal left
        for number in range(len(worker.spools)):
            with worker.judged(number) as (spool, judged):
                yield from judged
                left += spool.left

    cutter.settle(rows())
    return left


def _cut(worker: CutSpool, cutter: SegmentCutter, read: ReadList) -> int:
    """Cuts spools on workers; returns what ``cut_in_tasks`` does."""
    store, index, packs = worker.cut.store, worker.cut.index, worker.packs
    given = enumerate(worker.spools)
    keys = [digest(["cut", LAYOUT, read.how, index, packs, number, *each]) for number, each in given]
    made = _run(read.ctx, worker, keys, "rows", read.total.rows, "shards")
    for data in ordered_map(lambda shard: [read_blob(store, shard.blobs[name]) for name in ("shards", "rest")], made):
        shards, rest = parse_object(data[0], list[SourceShard]), json.loads(data[1])
        cutter.take(map(_with_verdict, rest["head"]))
        cutter.take_shards(shards)
        cutter.take(map(_with_verdict, rest["tail"]))
    return sum(shard.counts["left"] for shard in made)


def _run(ctx: Context, worker: ShardWorker, keys: Sequence[str], unit: str, amount: int, title: str) -> list[Shard]:
    """Runs a pass, and returns the shard of each task in order. Tasks are known by their numbers."""
    # A record of an earlier list has the number that its task had there, and equal tasks have one record.
    tasks = {key: ShardTask(number, key, {}) for number, key in enumerate(keys)}
    title = f"{ctx.stage} {title}"
    made, _ = run_shards(ctx, list(tasks.values()), lambda: worker, unit, amount, title)
    found = {shard.key: shard for shard in made}
    return [found[key] for key in keys]


@dataclass(frozen=True)
class ReadParts:
    """Reads the parts of a task into a spool, the blob "rows", and packs the hashes of their references by bucket.

    The blob "note" has what is to be said of them.
    """

    path: str
    cut: ShardCutter
    tasks: Sequence[Sequence[ListedPart]]

    def __call__(self, task: ShardTask) -> ShardOutput:
        parts, most = self.tasks[task.number], SEGMENT_SHARDS * self.cut.recipe.shard_rows + 1
        spool = RowSpool()
        try:
            with _told() as said, PartReader(self.path, self.cut.recipe) as reader:
                for each in parts:
                    spool.add(islice(reader.read(each.part), most), self.cut.reference)
                    check_unchanged(each.part, each.version)
            with SeenReferences() as seen:
                hashes = seen.judge(spool.hashes()).fresh
                output = write_pack((each.tobytes() for each in cut_ranges(hashes, BUCKETS)), BUCKETS)
            note = json.dumps({"said": said, "flaw": reader.flaw}).encode()
            blobs = {**output.blobs, "rows": spool.save(), "note": note}
        except BaseException:
            spool.__exit__()
            raise

        def finished() -> None:
            output.finished()
            spool.__exit__()

        return replace(output, ledger=Ledger(len(parts)), blobs=blobs, counts=reader.counts, finished=finished)


@contextmanager
def _told() -> Iterator[list[str]]:
    """Yields a list of the lines that are logged while the block lasts; a worker shows them to nobody."""
    lines: list[str] = []
    log, handler = logging.getLogger("unclip"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = log.level
    log.addHandler(handler)
    if not log.isEnabledFor(logging.INFO):
        log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@dataclass(frozen=True)
class CompareReferences:
    """Finds, in a range of hashes, those that an earlier spool has, too, or a row before all of them.

    The blob "pack" has a piece of them for each spool, and "hashes" those that nothing before has.
    """

    store: Store
    packs: Sequence[str]
    seen: Sequence[Sequence[str]]
    ways: int

    def __call__(self, task: ShardTask) -> ShardOutput:
        low, high = ranges(self.ways)[task.number]
        read = ordered_map(lambda pack: b"".join(read_pieces(self.store, pack, low, high)), self.packs)
        pieces = [np.frombuffer(data, HASH) for data in read]
        hashes = np.concatenate(pieces)
        distinct, first = np.unique(hashes, return_index=True)  # of equal ones the earliest
        known = np.zeros(len(distinct), np.bool_)
        for blobs in self.seen:
            for blob, (begin, end) in zip(blobs, ranges(len(blobs)), strict=True):
                if begin < high and low < end:
                    earlier = np.frombuffer(read_blob(self.store, blob), HASH)
                    mark_known(distinct, within_range(earlier, low, high), known)
        again = np.ones(len(hashes), np.bool_)
        again[first[~known]] = False
        verdicts = np.split(again, np.cumsum([len(piece) for piece in pieces])[:-1])
        parts = (piece[verdict].tobytes() for piece, verdict in zip(pieces, verdicts, strict=True))
        output = write_pack(parts, len(pieces))
        return replace(output, blobs={**output.blobs, "hashes": distinct[~known].tobytes()})


@dataclass(frozen=True)
class CutSpool:
    """Cuts the rows of a spool into the shards of a segment.

    The blob "shards" lists those that are full, and "rest" has the rows before and behind them.

    Attributes:
        cut: Cutter of the segment's shards.
        spools: Blob of each spool, and the number of rows of the segment before it.
        packs: Packs of the hashes in each spool that an earlier one has, too.
    """

    cut: ShardCutter
    spools: Sequence[tuple[str, int]]
    packs: Sequence[str]

    @contextmanager
    def judged(self, number: int) -> Iterator[tuple[RowSpool, Iterator[JudgedRow]]]:
        """Yields a spool and its rows, each with whether it is a duplicate."""
        store = self.cut.store
        pieces = ordered_map(lambda pack: read_pieces(store, pack, number, number + 1)[0], self.packs)
        with SeenReferences() as seen, RowSpool.load(store, self.spools[number][0]) as spool:
            seen.add(np.frombuffer(b"".join(pieces), HASH))
            yield spool, spool.judged(seen.judge(spool.hashes()).duplicate)

    def __call__(self, task: ShardTask) -> ShardOutput:
        size = self.cut.recipe.shard_rows
        _, before = self.spools[task.number]
        shards: list[SourceShard] = []
        with self.judged(task.number) as (spool, rows):
            head = list(islice(rows, -before % size))
            while len(tail := list(islice(rows, size))) == size:
                shards.append(self.cut.shard(-(-before // size) + len(shards), tail))
            rest = {"head": list(map(_verdict_values, head)), "tail": list(map(_verdict_values, tail))}
            blobs = {"shards": _SHARDS.dump_json(shards), "rest": json.dumps(rest).encode()}
            return ShardOutput(Ledger(spool.count), blobs, {"left": spool.left})


def _verdict_values(each: tuple[ListRow, bool]) -> list[Any]:
    row, again = each
    return [again, *row_values(row)]


def _with_verdict(values: Sequence[Any]) -> tuple[ListRow, bool]:
    again, *rest = values
    return row_of(rest), again
