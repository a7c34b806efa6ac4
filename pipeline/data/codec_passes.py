"""The three passes that fit the codec, as workers of shards: moments, coordinates, buckets.

A block is a run of neighbouring shards. Its moments are summed in its order, and blocks are merged in theirs, so
that the result has the same bits for any number of workers. A worker holds one block of coordinates, or as many
columns of all blocks as make ``COLUMN_VALUES`` numbers: no pass holds all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.artifacts import ShardRow, read_table
from pipeline.data.embeddings import read_embeddings
from pipeline.ledger import Ledger
from pipeline.records import read_blob
from pipeline.shards import ShardOutput, ShardTask
from pipeline.store import Store

# A change of either is a new version of the stage: the first orders the sums, both shape what an earlier run left.
BLOCK_ROWS = 1 << 16
COLUMN_VALUES = 1 << 24


@dataclass(frozen=True)
class Block:
    """Neighbouring shards, each a pair of curation's and embeddings', and their number of training rows."""

    shards: tuple[tuple[ShardRow, ShardRow], ...]
    rows: int

    def task(self, number: int, key: str) -> ShardTask:
        """The block as a task; its inputs are in the order of shards."""
        inputs: dict[str, ShardRow] = {}
        for i, (curation, embeddings) in enumerate(self.shards):
            inputs |= {f"{i:08d} curation": curation, f"{i:08d} embeddings": embeddings}
        return ShardTask(number, key, inputs)


def cut_blocks(curation: Sequence[ShardRow], embeddings: Sequence[ShardRow], block_rows: int) -> list[Block]:
    """Shards with training rows, in order, cut into blocks of ``block_rows`` or a little more; the last may have
    fewer."""
    embedded = {shard.number: shard for shard in embeddings}
    blocks = []
    shards: list[tuple[ShardRow, ShardRow]] = []
    rows = 0
    for shard in curation:
        if shard.counts["train/0"]:
            shards.append((shard, embedded[shard.number]))
            rows += shard.counts["train/0"]
        if rows >= block_rows:
            blocks.append(Block(tuple(shards), rows))
            shards, rows = [], 0
    return [*blocks, Block(tuple(shards), rows)] if shards else blocks


def training_embeddings(store: Store, inputs: Mapping[str, ShardRow]) -> Iterator[tuple[Any, Any]]:
    """Image and text embeddings, fp64 [n, d], of the curated training rows of each shard of a block, in order."""
    import numpy as np
    import torch

    ordered = iter(sorted(inputs.items()))
    for (_, curation), (_, embeddings) in zip(ordered, ordered, strict=True):
        index = read_table(store, curation.blobs["index"], ["key", "split"]).to_pydict()
        wanted = {k for k, split in zip(index["key"], index["split"], strict=True) if split == "train"}
        keys, image, text, _ = read_embeddings(store, embeddings.blobs["embeddings"])
        rows = np.array([key in wanted for key in keys])
        yield torch.from_numpy(image[rows].astype(np.float64)), torch.from_numpy(text[rows].astype(np.float64))


@dataclass(frozen=True)
class SumMoments:
    """The first pass: a block to "moments", the sum and the sum of outer products of its image embeddings, fp64."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        from safetensors.torch import save

        from models.codec import moments

        sums = None
        for image, _ in training_embeddings(self.store, task.inputs):
            sums = moments(image) if sums is None else sums.merge(moments(image))
        assert sums is not None
        return ShardOutput(Ledger(kept=sums.rows), {"moments": save({"total": sums.total, "gram": sums.gram})})


@dataclass(frozen=True)
class Project:
    """The second pass: a block to its columns, ``group`` to a blob: coordinates, then the dot products with the text.

    A blob is little-endian fp64 [columns, rows], every column sorted.
    """

    store: Store
    pca: str
    group: int

    def __call__(self, task: ShardTask) -> ShardOutput:
        import torch
        from safetensors.torch import load

        pca = load(read_blob(self.store, self.pca))
        columns = []
        for image, text in training_embeddings(self.store, task.inputs):
            coordinates = (image - pca["mean"]) @ pca["components"].T
            columns.append(torch.cat([coordinates, (image * text).sum(1, keepdim=True)], dim=1).T)
        ordered = torch.cat(columns, dim=1).sort(dim=1).values
        groups = ordered.split(self.group)
        blobs = {group_name(i): group.contiguous().numpy().tobytes() for i, group in enumerate(groups)}
        return ShardOutput(Ledger(kept=ordered.shape[1]), blobs)


@dataclass(frozen=True)
class CutBuckets:
    """The third pass: one group of columns of all blocks to "buckets": edges, values, counts and squared error of each
    column."""

    store: Store
    buckets: int

    def __call__(self, task: ShardTask) -> ShardOutput:
        import numpy as np
        import torch
        from safetensors.torch import save

        from models.codec import digitize, fit_buckets

        name = group_name(task.number)
        parts = []
        for _, block in sorted(task.inputs.items()):
            stored = np.frombuffer(read_blob(self.store, block.blobs[name]), "<f8")
            parts.append(torch.from_numpy(stored.reshape(-1, block.kept).copy()))
        columns = torch.cat(parts, dim=1).T
        edges, values, counts = fit_buckets(columns, self.buckets)
        means = values.gather(1, digitize(columns, edges).T)
        error = (columns.T - means).square().sum(1)
        fitted = save({"edges": edges, "values": values, "counts": counts, "error": error})
        return ShardOutput(Ledger(kept=columns.shape[1]), {"buckets": fitted})


def group_name(number: int) -> str:
    return f"columns.{number:04d}"


@dataclass(frozen=True)
class OneThread:
    """Makes a worker of a pass, on one thread: one order of summation."""

    worker: SumMoments | Project | CutBuckets

    def __call__(self) -> SumMoments | Project | CutBuckets:
        import torch

        torch.set_num_threads(1)
        return self.worker
