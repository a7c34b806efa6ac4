"""Thresholds that are shares of the data: measured once and pinned, so that appended rows move none of them.

Like CLIP and the codec, they are made from the first data and kept for later data.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field
from safetensors.numpy import load, save

from pipeline.data.neighbours.blocks import cut_blocks, pass_task, run_pass, shards_of
from pipeline.graph.artifacts import Artifact, publish_artifact, read_shards, read_table
from pipeline.graph.stages import Context, Stage
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.settings import ShardSettings
from pipeline.store import Store
from pipeline.store.records import read_blob

BLOCK_ROWS = 1 << 18
BINS = 1 << 16  # of similarities from -1 to 1: a change is a new version


@dataclass(frozen=True)
class ThresholdsRecipe:
    """Says which share of the data is below a threshold.

    Attributes:
        similarity: Share of the training rows that curation rejects: those with the lowest similarity of image and text
            embedding. It includes rows rejected for another reason, such as no caption. Held-out rows are judged by the
            same threshold.
    """

    similarity: Annotated[float, Field(ge=0, lt=1)] = 0.0


@dataclass(frozen=True)
class CountSimilarities:
    """Makes the "counts" of the similarities of a block's training rows: int64 [BINS]."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        counts = np.zeros(BINS, np.int64)
        for pairs, embeddings in shards_of(task):
            index = read_table(self.store, pairs.blobs["index"], ["key", "split"]).to_pydict()
            training = {k for k, split in zip(index["key"], index["split"], strict=True) if split == "train"}
            table = read_table(self.store, embeddings.blobs["embeddings"], ["key", "similarity"]).to_pydict()
            values = [s for key, s in zip(table["key"], table["similarity"], strict=True) if key in training]
            counts += count_by_bin(np.array(values))
        return ShardOutput(Ledger(kept=int(counts.sum())), {"counts": save({"counts": counts})})


def count_by_bin(similarities: np.ndarray) -> np.ndarray:
    """Counts similarities [n] by bin, int64 [BINS], and leaves out NaN and Inf."""
    finite = similarities[np.isfinite(similarities)].astype(np.float64)
    half = BINS // 2
    bins = np.clip(np.floor(finite * half) + half, 0, BINS - 1).astype(np.int64)  # exact: half is a power of two
    return np.bincount(bins, minlength=BINS)


def lowest(counts: np.ndarray, share: float) -> float:
    """Returns the highest edge of a bin with at most ``share`` of the counts below it; -1 where all counts are 0."""
    below = np.cumsum(counts)
    if not below[-1]:
        return -1.0
    full = int(np.searchsorted(below, share * below[-1], side="right"))
    return 2 * min(full, BINS - 1) / BINS - 1


def run_thresholds(ctx: Context) -> Artifact:
    """Counts the similarities of all training rows and reads the threshold off the counts."""
    began = time.monotonic()
    embeddings = {shard.number: shard for shard in read_shards(ctx.store, ctx.inputs["embeddings"])}
    blocks = cut_blocks(read_shards(ctx.store, ctx.inputs["pairs"]), embeddings, BLOCK_ROWS)
    tasks = [pass_task(ctx, block.number, "count", block.inputs()) for block in blocks]
    counts = np.zeros(BINS, np.int64)
    for shard in run_pass(ctx, CountSimilarities(ctx.store), tasks, "similarities"):
        counts += load(read_blob(ctx.store, shard.blobs["counts"]))["counts"]
    metrics = {"min_similarity": lowest(counts, ctx.recipe.similarity)}
    artifact = ctx.publishable(ledger=Ledger(kept=int(counts.sum())), metrics=metrics)
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)


THRESHOLDS = Stage(
    "thresholds",
    version=1,
    recipe=ThresholdsRecipe,
    inputs=("pairs", "embeddings"),
    run=run_thresholds,
    settings=ShardSettings,
    pinned=True,
    row_seconds=lambda *_: 1e-4,
)
