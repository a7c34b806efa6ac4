"""The index: which curated pictures are nearest to an embedding, for audits and for search by caption.

Every block of shards has faiss indices of its own, one a split, so making them and looking in them take the memory of
one block, and a block that is there is not made again when rows are appended. A small set keeps its vectors as they are
and every answer is exact; a large one keeps codes in inverted files (IVF-PQ; Jégou et al., 2011).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pipeline.data.neighbours.blocks import (
    OneThread,
    Sample,
    as_input,
    candidates,
    cut_blocks,
    make_task,
    plan,
    run_pass,
)
from pipeline.data.neighbours.cells import SPLITS
from pipeline.graph.artifacts import Artifact
from pipeline.graph.shard_tables import ShardRow, read_shards
from pipeline.graph.shards import ShardOutput, ShardTask, map_shards
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.records import read_blob

VERSION = 1

# A change of any is a new version.
FLAT_BLOCK_ROWS = 1 << 16  # vectors of a block
CODED_BLOCK_ROWS = 1 << 20  # codes of a block
SAMPLES = 1 << 16  # training rows from which the codes are learnt
LISTS = 1024  # of an inverted file, at most
LIST_SAMPLES = 39  # a list, at least: faiss's own advice
CODE_COMPONENTS = 8  # components of a vector in one byte of its code

PROBES = 32  # lists that a search looks in


@dataclass(frozen=True)
class IndexRecipe:
    """Says how the search index stores embeddings.

    Attributes:
        flat_rows: Training rows up to which embeddings are stored as they are and answers are exact; more are
            stored as codes (IVF-PQ, a byte for 8 components), and answers are approximate.
    """

    flat_rows: Annotated[int, Field(ge=256)] = 1 << 20  # a byte of a code is fitted to 256 rows or more


@dataclass(frozen=True)
class MakeIndex:
    """A block to the faiss indices of its rows, one a split; ids are row keys as numbers. The input "empty", if
    there is one, is a trained index without rows that these begin as; else vectors are stored as they are, float16."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        import faiss

        indices: dict[str, Any] = {}
        counts = dict.fromkeys(SPLITS, 0)
        for rows, vectors, _ in candidates(self.store, task):
            keys = np.array([int(row["key"]) for row in rows], np.int64)
            for split in SPLITS:
                mine = np.array([row["split"] == split for row in rows])
                if mine.any():
                    if split not in indices:
                        indices[split] = self._empty(task, vectors.shape[1])
                    indices[split].add_with_ids(vectors[mine].astype(np.float32), keys[mine])
                    counts[split] += int(mine.sum())
        blobs = {split: faiss.serialize_index(index).tobytes() for split, index in indices.items()}
        return ShardOutput(Ledger(kept=sum(counts.values())), blobs, counts)

    def _empty(self, task: ShardTask, width: int) -> Any:
        import faiss

        if "empty" in task.inputs:
            return open_index(self.store, task.inputs["empty"].blobs["empty"])
        flat = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        return faiss.IndexIDMap2(flat)


@dataclass(frozen=True)
class Train:
    """The samples of all blocks to an "empty" IVF-PQ index."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        import faiss
        from safetensors.numpy import load

        samples = [part for _, part in sorted(task.inputs.items())]
        sample = np.concatenate([load(read_blob(self.store, part.blobs["sample"]))["sample"] for part in samples])
        width = sample.shape[1]
        lists = max(1, min(LISTS, len(sample) // LIST_SAMPLES))
        length = max(n for n in range(1, max(1, width // CODE_COMPONENTS) + 1) if width % n == 0)
        quantizer = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFPQ(quantizer, width, lists, length, 8, faiss.METRIC_INNER_PRODUCT)
        index.train(sample.astype(np.float32))
        return ShardOutput(Ledger(kept=1), {"empty": faiss.serialize_index(index).tobytes()})


def run_index(ctx: Context) -> Artifact:
    """Index the image embeddings of all curated rows."""
    curated = read_shards(ctx.store, ctx.inputs["curation"])
    embeddings = {shard.number: shard for shard in read_shards(ctx.store, ctx.inputs["embeddings"])}
    training = sum(shard.counts["train/0"] for shard in curated)
    coded = training > ctx.recipe.flat_rows
    blocks = cut_blocks(curated, embeddings, CODED_BLOCK_ROWS if coded else FLAT_BLOCK_ROWS)
    inputs = [block.inputs() for block in blocks]
    if coded:
        empty = _train(ctx, inputs, max(1, training // SAMPLES))
        inputs = [own | {"empty": empty} for own in inputs]
    tasks = [make_task(ctx, block.number, "index", own) for block, own in zip(blocks, inputs, strict=True)]
    rows = sum(block.rows for block in blocks)
    return map_shards(ctx, tasks, OneThread(MakeIndex(ctx.store)), "rows", rows)


def _train(ctx: Context, inputs: Sequence[Mapping[str, ShardRow]], stride: int) -> ShardRow:
    """An IVF-PQ index without rows, learnt from training rows."""
    tasks = [make_task(ctx, i, "sample", {**own, "plan": plan(stride=stride)}) for i, own in enumerate(inputs)]
    sampled = run_pass(ctx, Sample(ctx.store), tasks, "samples")
    parts = {f"{i:08d}": as_input(shard) for i, shard in enumerate(sampled)}
    [trained] = run_pass(ctx, Train(ctx.store), [make_task(ctx, 0, "train", parts)], "codes", "codebooks")
    return as_input(trained)


def open_index(store: Store, blob: str) -> Any:
    """A faiss index of the store, in memory."""
    import faiss

    return faiss.deserialize_index(np.frombuffer(read_blob(store, blob), np.uint8))


def search(
    store: Store, index: Artifact, queries: np.ndarray, count: int, splits: Sequence[str] = SPLITS
) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` rows of ``splits`` that are nearest to each of ``queries`` [n, d], nearest first.

    Returns their cosines fp32 [n, count] and row keys as numbers int64 [n, count], -inf and -1 where there are fewer.
    Cosines are those of stored codes where the index holds codes. Equal ones come in the order of keys. Reads one block
    after the other.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    best: Any = np.full((len(queries), count), -np.inf, np.float32)
    keys: Any = np.full((len(queries), count), -1, np.int64)
    for shard in read_shards(store, index):
        for split in splits:
            if split not in shard.blobs:
                continue
            part = open_index(store, shard.blobs[split])
            if hasattr(part, "nprobe"):
                part.nprobe = PROBES
            similarity, ids = part.search(queries, min(count, part.ntotal))
            similarity = np.where(ids < 0, -np.inf, similarity).astype(np.float32)
            best, keys = np.hstack([best, similarity]), np.hstack([keys, ids])
            order = np.lexsort((keys, -best))[:, :count]
            best, keys = (np.take_along_axis(table, order, 1) for table in (best, keys))
    return best, keys
