"""Blocks of shards with embeddings, and passes of workers over them.

A pass is a list of tasks, and its results are inputs of the next pass. A task's key is that of all its inputs, so the
results of an interrupted run, or of a run with fewer rows, are not made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from pipeline.data.embeddings.parts import read_embeddings
from pipeline.graph.artifacts import Shard, ShardRow, read_table
from pipeline.graph.shards import run_shards
from pipeline.graph.stages import Context, shard_key
from pipeline.graph.workers import ShardOutput, ShardTask, ShardWorker
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.store.records import digest, read_blob


@dataclass(frozen=True)
class Block:
    """Neighbouring curated shards, each with its shard of embeddings, and their number of curated rows."""

    number: int
    shards: tuple[tuple[ShardRow, ShardRow], ...]
    rows: int

    def inputs(self) -> dict[str, ShardRow]:
        """Returns its shards as a task names them."""
        inputs: dict[str, ShardRow] = {}
        for curated, embeddings in self.shards:
            inputs |= {
                input_name("curated", curated.number): curated,
                input_name("embeddings", curated.number): embeddings,
            }
        return inputs


def cut_blocks(
    curated: Sequence[ShardRow], embeddings: Mapping[int, ShardRow], block_rows: int, first: int = 0
) -> list[Block]:
    """Cuts shards with rows, in order, into blocks of ``block_rows`` or a little more; the last may have fewer.

    Blocks are numbered from ``first``.
    """
    cuts: list[list[ShardRow]] = []
    rows = block_rows  # so that the first shard with rows opens a block
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


def input_name(what: str, number: int) -> str:
    """Returns the name of one of many inputs or blobs; names sort by number."""
    return f"{what} {number:08d}"


def number_of(name: str) -> int:
    """Returns the number in a name that ``input_name`` made."""
    return int(name.rpartition(" ")[2])


def is_a(name: str, what: str) -> bool:
    """Tells whether ``input_name`` made a name for one of these."""
    return name.partition(" ")[0] == what


def as_input(shard: Shard) -> ShardRow:
    """Returns a shard of one pass as an input of a later one."""
    return ShardRow(shard.number, shard.key, shard.ledger.kept, 0, shard.blobs, shard.counts)


def run_pass(
    ctx: Context, worker: ShardWorker, tasks: Sequence[ShardTask], title: str, unit: str = "rows"
) -> list[Shard]:
    """Runs one pass and returns the shard of each task, in their order. Tasks with one key are made once."""
    distinct = {task.key: task for task in tasks}
    rows = sum(curated.kept for task in distinct.values() for curated, _ in shards_of(task))
    amount = rows if unit == "rows" else len(distinct)
    shards, _ = run_shards(ctx, list(distinct.values()), OneThread(worker), unit, amount, f"{ctx.stage} {title}")
    made = {shard.key: shard for shard in shards}
    return [made[task.key] for task in tasks]


def pass_task(ctx: Context, number: int, what: str, inputs: Mapping[str, ShardRow]) -> ShardTask:
    """Makes a task of the pass ``what``, whose key is that of all its inputs."""
    key = shard_key(ctx, {"pass": what} | {name: shard.key for name, shard in inputs.items()})
    return ShardTask(number, key, inputs)


def constants(**values: int) -> ShardRow:
    """Returns numbers as an input of a task, which its key then depends on."""
    return ShardRow(0, digest(values), 0, 0, {}, values)


@dataclass(frozen=True)
class OneThread:
    """Makes a worker of a pass, on one faiss thread: the same bits wherever it runs."""

    worker: ShardWorker

    def __call__(self) -> ShardWorker:
        import faiss

        faiss.omp_set_num_threads(1)
        return self.worker


def shards_of(task: ShardTask) -> Iterator[tuple[ShardRow, ShardRow]]:
    """Yields the curated shards of a task's block, in order, each with its embeddings."""
    for name, curated in sorted(task.inputs.items()):
        if is_a(name, "curated"):
            yield curated, task.inputs[name.replace("curated", "embeddings")]


def candidates(store: Store, task: ShardTask) -> Iterator[tuple[list[dict[str, Any]], np.ndarray, np.ndarray]]:
    """Yields the index rows of each curated shard of a block, in order, and their embeddings float16 [n, d].

    The embeddings are those of images and of first captions.
    """
    for curated, embeddings in shards_of(task):
        rows = read_table(store, curated.blobs["index"], ["key", "split", "width", "height"]).to_pylist()
        keys, image, text, _ = read_embeddings(store, embeddings.blobs["embeddings"])
        # Every row that pairs kept has embeddings, also one that curation has rejected since.
        place = {key: i for i, key in enumerate(keys)}
        places = [place[row["key"]] for row in rows]
        yield rows, image[places], text[places]


@dataclass(frozen=True)
class SampleVectors:
    """Takes a "sample" of a block: the image embeddings of one in ``stride`` training rows, float16 [n, d]."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        taken, trained, seen, stride = [], 0, 0, task.inputs["plan"].counts["stride"]
        for rows, vectors, _ in candidates(self.store, task):
            training = vectors[[row["split"] == "train" for row in rows]]
            # The stride goes on from shard to shard: the sample does not depend on where the list was cut.
            taken.append(training[-trained % stride :: stride].copy())  # of a block of a million rows no more stays
            trained += len(training)
            seen += len(rows)
        sample = np.concatenate(taken)
        blob = save({"sample": np.ascontiguousarray(sample[np.isfinite(sample).all(1)])})
        return ShardOutput(Ledger(kept=seen), {"sample": blob})


def read_samples(store: Store, task: ShardTask) -> np.ndarray:
    """Returns the samples of all blocks among a task's inputs, float16 [n, d]."""
    blobs = [part.blobs["sample"] for _, part in sorted(task.inputs.items()) if "sample" in part.blobs]
    return np.concatenate([load(data)["sample"] for data in ordered_map(lambda blob: read_blob(store, blob), blobs)])
