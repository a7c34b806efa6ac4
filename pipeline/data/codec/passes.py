"""The three passes that fit the codec, as workers of shards: moments, coordinates, buckets.

A block is a run of neighbouring shards. Its moments are summed in its order, and blocks are merged in theirs, so
that the result has the same bits for any number of workers. A worker holds the coordinates of one block, or as many
columns of all blocks as make ``COLUMN_VALUES`` numbers, and at least one: above so many rows, 8 bytes for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.graph.artifacts import ShardRow, read_table
from pipeline.graph.shards import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.records import read_blob

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


def training_embeddings(store: Store, inputs: Mapping[str, ShardRow], *names: str) -> Iterator[list[Any]]:
    """Columns of embeddings, fp64 [n, d] each, of the curated training rows of each shard of a block, in order."""
    import numpy as np
    import pyarrow.compute as pc
    import torch

    ordered = iter(sorted(inputs.items()))
    for (_, curation), (_, embeddings) in zip(ordered, ordered, strict=True):
        index = read_table(store, curation.blobs["index"], ["key", "split"])
        wanted = index["key"].filter(pc.equal(index["split"], "train"))
        table = read_table(store, embeddings.blobs["embeddings"], ["key", *names])
        rows = pc.is_in(table["key"], value_set=wanted).to_numpy()
        flat = [table[name].combine_chunks().values.to_numpy(zero_copy_only=False) for name in names]
        yield [torch.from_numpy(values.reshape(len(rows), -1)[rows].astype(np.float64)) for values in flat]


@dataclass(frozen=True)
class SumMoments:
    """The first pass: a block to "moments", the sum and the sum of outer products of its image embeddings, fp64."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        from safetensors.torch import save

        from models.codec import moments

        sums = None
        for (image,) in training_embeddings(self.store, task.inputs, "image_embedding"):
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
        import numpy as np
        from safetensors.torch import load

        pca = load(read_blob(self.store, self.pca))
        rows = sum(shard.counts["train/0"] for name, shard in task.inputs.items() if name.endswith("curation"))
        columns = np.empty((len(pca["components"]) + 1, rows), "<f8")
        stop = 0
        for image, text in training_embeddings(self.store, task.inputs, "image_embedding", "text_embedding"):
            start, stop = stop, stop + len(image)
            columns[:-1, start:stop] = ((image - pca["mean"]) @ pca["components"].T).T.numpy()
            columns[-1, start:stop] = (image * text).sum(1).numpy()
        assert stop == rows
        columns.sort(axis=1)
        starts = range(0, len(columns), self.group)
        blobs = {group_name(i): columns[start : start + self.group].tobytes() for i, start in enumerate(starts)}
        return ShardOutput(Ledger(kept=rows), blobs)


@dataclass(frozen=True)
class CutBuckets:
    """The third pass: one group of columns of all "blocks", a table of shards, to "buckets": edges, values, counts and
    squared error of each column."""

    store: Store
    buckets: int

    def __call__(self, task: ShardTask) -> ShardOutput:
        import numpy as np
        import torch
        from safetensors.torch import save

        from models.codec import bucket_errors, cut_buckets

        blocks, name = task.inputs["blocks"], f"blob.{group_name(task.number)}"
        columns: Any = None
        stop = 0
        for block in read_table(self.store, blocks.blobs["blocks"], ["kept", name]).to_pylist():
            stored = np.frombuffer(read_blob(self.store, block[name]), "<f8").reshape(-1, block["kept"])
            if columns is None:
                columns = np.empty((len(stored), blocks.kept))
            start, stop = stop, stop + block["kept"]
            columns[:, start:stop] = stored
        columns.sort(axis=1)
        ordered = torch.from_numpy(columns)
        edges, values, counts = cut_buckets(ordered, self.buckets)
        fitted = {"edges": edges, "values": values, "counts": counts, "error": bucket_errors(ordered, edges, values)}
        return ShardOutput(Ledger(kept=len(columns)), {"buckets": save(fitted)})


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
