"""The faiss indices of an artefact: how they are made, and the search in them.

Vectors are stored as an index of each block and split, which a search reads whole. Codes are stored as lists, of which
a search reads those near to its query.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import faiss
import numpy as np

from pipeline.data.neighbours.blocks import (
    OneThread,
    SampleVectors,
    as_input,
    candidates,
    constants,
    cut_blocks,
    pass_task,
    run_pass,
)
from pipeline.data.neighbours.exchange import pack_range, store_tables
from pipeline.data.neighbours.inverted_files import CodeRows, MergeLists, TrainLists, open_index, read_near_lists
from pipeline.data.neighbours.work import lists_of
from pipeline.data.pairs.row_index import SPLITS
from pipeline.graph.artifacts import Artifact, ShardRow, read_shards
from pipeline.graph.shards import map_shards
from pipeline.graph.stages import Context
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.store import Store

# A change of any is a new version.
FLAT_BLOCK_ROWS = 1 << 16  # vectors of a block
CODED_BLOCK_ROWS = 1 << 22  # codes of a block, and of a merge of all blocks' lists
# Training rows that lists and codes are trained on: some for each list, as many as faiss advises where they fit into
# 2.4 GB at 768 components.
TRAINING_SAMPLES, LIST_SAMPLES, MAX_SAMPLES = 1 << 16, 39, 1 << 19


@dataclass(frozen=True)
class MakeIndex:
    """Makes the faiss indices of a block, one for each split, of vectors as float16; ids are row keys as numbers."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        indices: dict[str, Any] = {}
        for rows, vectors, _ in candidates(self.store, task):
            keys = np.array([int(row["key"]) for row in rows], np.int64)
            for split in SPLITS:
                mine = np.array([row["split"] == split for row in rows])
                if mine.any():
                    if split not in indices:
                        indices[split] = _flat(vectors.shape[1])
                    indices[split].add_with_ids(vectors[mine].astype(np.float32), keys[mine])
        counts = {split: indices[split].ntotal if split in indices else 0 for split in SPLITS}
        blobs = {split: faiss.serialize_index(index).tobytes() for split, index in indices.items()}
        return ShardOutput(Ledger(kept=sum(counts.values())), blobs, counts)


def _flat(width: int) -> faiss.Index:
    flat = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    return faiss.IndexIDMap2(flat)


def make_indices(ctx: Context) -> Artifact:
    """Indexes the image embeddings of all curated rows."""
    curated = read_shards(ctx.store, ctx.inputs["curation"])
    embeddings = {shard.number: shard for shard in read_shards(ctx.store, ctx.inputs["embeddings"])}
    training = sum(shard.counts["train/0"] for shard in curated)
    coded = training > ctx.recipe.flat_rows
    blocks = cut_blocks(curated, embeddings, CODED_BLOCK_ROWS if coded else FLAT_BLOCK_ROWS)
    inputs = [block.inputs() for block in blocks]
    rows = sum(block.rows for block in blocks)
    if coded:
        return _make_lists(ctx, inputs, rows, training)
    tasks = [pass_task(ctx, block.number, "index", own) for block, own in zip(blocks, inputs, strict=True)]
    return map_shards(ctx, tasks, OneThread(MakeIndex(ctx.store)), "rows", rows)


def _make_lists(ctx: Context, inputs: Sequence[Mapping[str, ShardRow]], rows: int, training: int) -> Artifact:
    trained = _train(ctx, inputs, training)
    tasks = [pass_task(ctx, i, "code", {**own, "lists": trained}) for i, own in enumerate(inputs)]
    [packs] = store_tables(ctx.store, [run_pass(ctx, CodeRows(ctx.store), tasks, "codes")])
    lists = trained.counts["lists"]
    merges = min(len(inputs), lists)
    bounds = pairwise(lists * i // merges for i in range(merges + 1))
    ranges = [{"packs": pack_range(packs, start, stop)} for start, stop in bounds]
    tasks = [pass_task(ctx, i, "merge lists", packs) for i, packs in enumerate(ranges)]
    read_first = {"empty": trained.blobs["empty"], "centroids": trained.blobs["pack"]}
    return map_shards(ctx, tasks, OneThread(MergeLists(ctx.store)), "rows", rows, blobs=read_first)


def _train(ctx: Context, inputs: Sequence[Mapping[str, ShardRow]], rows: int) -> ShardRow:
    """Trains lists and codes on some of ``rows`` training rows."""
    lists = lists_of(rows)
    stride = max(1, rows // min(MAX_SAMPLES, max(TRAINING_SAMPLES, LIST_SAMPLES * lists)))
    tasks = [pass_task(ctx, i, "sample", {**own, "plan": constants(stride=stride)}) for i, own in enumerate(inputs)]
    sampled = run_pass(ctx, SampleVectors(ctx.store), tasks, "samples")
    parts = {f"{i:08d}": as_input(shard) for i, shard in enumerate(sampled)} | {"plan": constants(lists=lists)}
    [trained] = run_pass(ctx, TrainLists(ctx.store), [pass_task(ctx, 0, "train", parts)], "lists", "codebooks")
    return as_input(trained)


def search(
    store: Store, index: Artifact, queries: np.ndarray, count: int, splits: Sequence[str] = SPLITS
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the ``count`` rows of ``splits`` that are nearest to each of ``queries`` [n, d].

    Vectors are read one block at a time, and of codes the lists near to any of the queries.

    Returns:
        Cosines fp32 [n, count] and row keys as numbers int64 [n, count], nearest first and equal ones by their keys;
        -inf and -1 where there are fewer rows. Where the index holds codes, cosines are those of the codes.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    best: np.ndarray = np.full((len(queries), count), -np.inf, np.float32)
    keys: np.ndarray = np.full((len(queries), count), -1, np.int64)
    for part in _read_parts(store, index, queries, splits):
        similarity, ids = part.search(queries, min(count, max(1, part.ntotal)))
        similarity = np.where(ids < 0, -np.inf, similarity).astype(np.float32)
        best, keys = np.hstack([best, similarity]), np.hstack([keys, ids])
        order = np.lexsort((keys, -best))[:, :count]
        best, keys = (np.take_along_axis(table, order, 1) for table in (best, keys))
    return best, keys


def _read_parts(store: Store, index: Artifact, queries: np.ndarray, splits: Sequence[str]) -> Iterator[faiss.Index]:
    if index.blobs:
        yield read_near_lists(store, index, queries, splits)
        return
    for shard in read_shards(store, index):
        yield from (open_index(store, shard.blobs[split]) for split in splits if shard.counts[split])
