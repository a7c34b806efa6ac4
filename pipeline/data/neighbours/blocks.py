"""Blocks of shards with image embeddings, and passes of workers over them.

A pass is a list of tasks; what it makes of one is an input of the next pass. A task's key is that of all its inputs, so
what is there already, of an interrupted run or of one with fewer rows, is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.embeddings.stage import read_embeddings
from pipeline.graph.artifacts import Shard
from pipeline.graph.shard_tables import ShardRow, read_table
from pipeline.graph.shards import ShardOutput, ShardTask, run_shards
from pipeline.graph.stages import Context, shard_key
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.records import digest

Worker = Callable[[ShardTask], ShardOutput]


@dataclass(frozen=True)
class Block:
    """Neighbouring shards: curated ones with those of embeddings, and their number of curated rows."""

    number: int
    shards: tuple[tuple[ShardRow, ShardRow], ...]
    rows: int

    @property
    def numbers(self) -> list[int]:
        """Of its shards."""
        return [curated.number for curated, _ in self.shards]

    def inputs(self) -> dict[str, ShardRow]:
        """As a task names them."""
        inputs: dict[str, ShardRow] = {}
        for curated, embeddings in self.shards:
            inputs |= {numbered("curated", curated.number): curated, numbered("embeddings", curated.number): embeddings}
        return inputs


def cut_blocks(
    curated: Sequence[ShardRow], embeddings: Mapping[int, ShardRow], block_rows: int, first: int = 0
) -> list[Block]:
    """Shards with rows, in order, cut into blocks of ``block_rows`` or a little more; the last may have fewer. Blocks
    are numbered from ``first``."""
    cuts: list[list[ShardRow]] = []
    rows = block_rows
    for shard in curated:
        if shard.kept:
            if rows >= block_rows:
                cuts.append([])
                rows = 0
            cuts[-1].append(shard)
            rows += shard.kept
    return [
        Block(first + i, tuple((s, embeddings[s.number]) for s in cut), sum(s.kept for s in cut))
        for i, cut in enumerate(cuts)
    ]


def numbered(what: str, number: int) -> str:
    """The name of an input or of a blob that there are many of; names sort by number."""
    return f"{what} {number:08d}"


def is_a(name: str, what: str) -> bool:
    """Whether an input is one of these."""
    return name.partition(" ")[0] == what


def as_input(shard: Shard) -> ShardRow:
    """A shard that was made, as a later pass takes it."""
    return ShardRow(shard.number, shard.key, shard.ledger.kept, 0, shard.blobs, shard.counts)


def run_pass(ctx: Context, worker: Worker, tasks: Sequence[ShardTask], title: str, unit: str = "rows") -> list[Shard]:
    """One pass: what it made of each task, in their order. Tasks with one key are one."""
    distinct = {task.key: task for task in tasks}
    rows = sum(shard.kept for task in distinct.values() for name, shard in task.inputs.items() if is_a(name, "curated"))
    amount = rows if unit == "rows" else len(distinct)
    shards, _ = run_shards(ctx, list(distinct.values()), OneThread(worker), unit, amount, f"{ctx.stage} {title}")
    made = {shard.key: shard for shard in shards}
    return [made[task.key] for task in tasks]


def make_task(ctx: Context, number: int, what: str, inputs: Mapping[str, ShardRow]) -> ShardTask:
    """A task of a pass: its key is that of all its inputs, so what is there already is not done again."""
    key = shard_key(ctx, {"pass": what} | {name: shard.key for name, shard in inputs.items()})
    return ShardTask(number, key, inputs)


def plan(**values: int) -> ShardRow:
    """Numbers that a task is given, as an input of it."""
    return ShardRow(0, digest(values), 0, 0, {}, values)


def part(shard: Shard, name: str) -> ShardRow:
    """A shard that was made, as the input of a later pass that needs one blob of it."""
    return ShardRow(shard.number, shard.key, shard.ledger.kept, 0, {name: shard.blobs[name]}, {})


@dataclass(frozen=True)
class OneThread:
    """Makes a worker of a pass, on one thread: the same bits wherever it runs."""

    worker: Worker

    def __call__(self) -> Worker:
        import faiss

        faiss.omp_set_num_threads(1)
        return self.worker


def candidates(store: Store, task: ShardTask) -> Iterator[tuple[list[dict[str, Any]], np.ndarray, np.ndarray]]:
    """Yields the index rows of each curated shard of a block, in order, and their embeddings float16 [n, d].

    The embeddings are those of images and of first captions.
    """
    for name, curated in sorted(task.inputs.items()):
        if is_a(name, "curated"):
            embeddings = task.inputs[name.replace("curated", "embeddings")]
            rows = read_table(store, curated.blobs["index"], ["key", "split", "width", "height"]).to_pylist()
            keys, image, text, _ = read_embeddings(store, embeddings.blobs["embeddings"])
            place = {key: i for i, key in enumerate(keys)}
            places = [place[row["key"]] for row in rows]
            yield rows, image[places], text[places]


@dataclass(frozen=True)
class Sample:
    """A pass that many begin with: a block to "sample", one in ``stride`` of its training rows, float16 [n, d]."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        from safetensors.numpy import save

        training, seen = [], 0
        for rows, vectors, _ in candidates(self.store, task):
            training.append(vectors[[row["split"] == "train" for row in rows]])
            seen += len(rows)
        sample = np.concatenate(training)[:: task.inputs["plan"].counts["stride"]]
        blob = save({"sample": np.ascontiguousarray(sample[np.isfinite(sample).all(1)])})
        return ShardOutput(Ledger(kept=seen), {"sample": blob})
