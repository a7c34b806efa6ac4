"""The faiss indices of blocks of shards: how they are made, and the search in them.

A block of vectors is stored as its index and read whole. A block of codes is stored as a pack with a piece for each
list of its inverted file, of which a query reads those that it looks in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any

import faiss
import numpy as np
from faiss.contrib.inspect_tools import get_invlist

from pipeline.data.neighbours.blocks import (
    OneThread,
    SampleVectors,
    as_input,
    candidates,
    constants,
    cut_blocks,
    pass_task,
    read_samples,
    run_pass,
)
from pipeline.data.neighbours.work import lists_of
from pipeline.data.pairs.row_index import SPLITS
from pipeline.graph.artifacts import Artifact, ShardRow, read_shards
from pipeline.graph.packs import read_pieces, write_pack
from pipeline.graph.shards import map_shards
from pipeline.graph.stages import Context
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.store.records import read_blob

# A change of any is a new version.
FLAT_BLOCK_ROWS = 1 << 16  # vectors of a block
CODED_BLOCK_ROWS = 1 << 22  # codes of a block: a query reads some lists of each, by requests of their own
TRAINING_SAMPLES = 1 << 16  # training rows that the codes are trained on, at least
LIST_SAMPLES = 39  # a list, at least: faiss's own advice
CODE_COMPONENTS = 8  # components of a vector in one byte of its code

LIST_PROBES = 32  # lists that a search looks in


@dataclass(frozen=True)
class MakeIndex:
    """Makes the faiss indices of a block, one for each split; ids are row keys as numbers.

    The task's input "empty", if there is one, is a trained index without rows that these begin as. Then it is stored
    again beside a "pack" of the lists of all splits. Else vectors are stored unchanged, as float16, by split.
    """

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        empty = task.inputs["empty"].blobs["empty"] if "empty" in task.inputs else ""
        indices: dict[str, Any] = {}
        counts = dict.fromkeys(SPLITS, 0)
        for rows, vectors, _ in candidates(self.store, task):
            keys = np.array([int(row["key"]) for row in rows], np.int64)
            for split in SPLITS:
                mine = np.array([row["split"] == split for row in rows])
                if mine.any():
                    if split not in indices:
                        indices[split] = open_index(self.store, empty) if empty else _flat(vectors.shape[1])
                    indices[split].add_with_ids(vectors[mine].astype(np.float32), keys[mine])
                    counts[split] += int(mine.sum())
        kept = Ledger(kept=sum(counts.values()))
        if not empty:
            whole = {split: faiss.serialize_index(index).tobytes() for split, index in indices.items()}
            return ShardOutput(kept, whole, counts)
        trained = open_index(self.store, empty)
        lists = product((indices.get(split, trained) for split in SPLITS), range(trained.nlist))
        packed = write_pack((_piece(index, number) for index, number in lists), len(SPLITS) * trained.nlist)
        coded = {**packed.blobs, "empty": read_blob(self.store, empty)}
        return replace(packed, ledger=kept, blobs=coded, counts=counts)


def _flat(width: int) -> faiss.Index:
    flat = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    return faiss.IndexIDMap2(flat)


def _piece(index: Any, number: int) -> bytes:
    """Returns a list of an inverted file: the ids of its rows, int64, then their codes."""
    ids, codes = get_invlist(index.invlists, number)
    return ids.tobytes() + codes.tobytes()


@dataclass(frozen=True)
class TrainIndex:
    """Trains an "empty" IVF-PQ index, of as many lists as the "plan" says at most, on the samples of all blocks."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        sample = read_samples(self.store, task)
        width = sample.shape[1]
        lists = max(1, min(task.inputs["plan"].counts["lists"], len(sample) // LIST_SAMPLES))
        length = max(n for n in range(1, max(1, width // CODE_COMPONENTS) + 1) if width % n == 0)
        quantizer = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFPQ(quantizer, width, lists, length, 8, faiss.METRIC_INNER_PRODUCT)
        index.train(sample.astype(np.float32))
        return ShardOutput(Ledger(kept=1), {"empty": faiss.serialize_index(index).tobytes()})


def make_indices(ctx: Context) -> Artifact:
    """Indexes the image embeddings of all curated rows."""
    curated = read_shards(ctx.store, ctx.inputs["curation"])
    embeddings = {shard.number: shard for shard in read_shards(ctx.store, ctx.inputs["embeddings"])}
    training = sum(shard.counts["train/0"] for shard in curated)
    coded = training > ctx.recipe.flat_rows
    blocks = cut_blocks(curated, embeddings, CODED_BLOCK_ROWS if coded else FLAT_BLOCK_ROWS)
    inputs = [block.inputs() for block in blocks]
    if coded:
        empty = _train(ctx, inputs, training)
        inputs = [own | {"empty": empty} for own in inputs]
    tasks = [pass_task(ctx, block.number, "index", own) for block, own in zip(blocks, inputs, strict=True)]
    rows = sum(block.rows for block in blocks)
    return map_shards(ctx, tasks, OneThread(MakeIndex(ctx.store)), "rows", rows)


def _train(ctx: Context, inputs: Sequence[Mapping[str, ShardRow]], rows: int) -> ShardRow:
    """Trains an IVF-PQ index without rows on some of ``rows`` training rows."""
    lists = lists_of(rows)
    stride = max(1, rows // max(TRAINING_SAMPLES, LIST_SAMPLES * lists))
    tasks = [pass_task(ctx, i, "sample", {**own, "plan": constants(stride=stride)}) for i, own in enumerate(inputs)]
    sampled = run_pass(ctx, SampleVectors(ctx.store), tasks, "samples")
    parts = {f"{i:08d}": as_input(shard) for i, shard in enumerate(sampled)} | {"plan": constants(lists=lists)}
    [trained] = run_pass(ctx, TrainIndex(ctx.store), [pass_task(ctx, 0, "train", parts)], "codes", "codebooks")
    return as_input(trained)


def open_index(store: Store, blob: str) -> Any:
    """Reads a faiss index of the store into memory, of the kind that was written."""
    return faiss.deserialize_index(np.frombuffer(read_blob(store, blob), np.uint8))


def search(
    store: Store, index: Artifact, queries: np.ndarray, count: int, splits: Sequence[str] = SPLITS
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the ``count`` rows of ``splits`` that are nearest to each of ``queries`` [n, d], one block at a time.

    Returns:
        Cosines fp32 [n, count] and row keys as numbers int64 [n, count], nearest first and equal ones by their keys;
        -inf and -1 where there are fewer rows. Where the index holds codes, cosines are those of the codes.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    best: np.ndarray = np.full((len(queries), count), -np.inf, np.float32)
    keys: np.ndarray = np.full((len(queries), count), -1, np.int64)
    trained = None
    for shard in read_shards(store, index):
        if "empty" in shard.blobs:  # the same in all blocks
            trained = trained or open_index(store, shard.blobs["empty"])
        for split in splits:
            if not shard.counts[split]:
                continue
            part = (
                _read_lists(store, shard, split, trained, queries) if trained else open_index(store, shard.blobs[split])
            )
            similarity, ids = part.search(queries, min(count, part.ntotal))
            similarity = np.where(ids < 0, -np.inf, similarity).astype(np.float32)
            best, keys = np.hstack([best, similarity]), np.hstack([keys, ids])
            order = np.lexsort((keys, -best))[:, :count]
            best, keys = (np.take_along_axis(table, order, 1) for table in (best, keys))
    return best, keys


def _read_lists(store: Store, shard: ShardRow, split: str, index: Any, queries: np.ndarray) -> Any:
    """Puts into an index of a block's lists, in place of what it has, those that a search for ``queries`` looks in."""
    index.reset()
    index.nprobe = min(LIST_PROBES, index.nlist)
    wanted = np.unique(index.quantizer.search(queries, index.nprobe)[1])
    runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1)  # neighbouring lists are one range of the blob
    first = SPLITS.index(split) * index.nlist

    def read(run: np.ndarray) -> list[bytes]:
        return read_pieces(store, shard.blobs["pack"], first + int(run[0]), first + int(run[-1]) + 1)

    for number, piece in zip(wanted.tolist(), chain.from_iterable(ordered_map(read, runs)), strict=True):
        rows = len(piece) // (8 + index.code_size)
        ids, codes = np.frombuffer(piece, np.int64, rows), np.frombuffer(piece, np.uint8, offset=8 * rows)
        index.invlists.add_entries(number, rows, faiss.swig_ptr(ids), faiss.swig_ptr(codes))
        index.ntotal += rows
    return index
