"""Finds near-duplicates and leaks over all shards: five passes of workers around ``neighbours``, in bounded memory.

Rows come in the order of their keys. They are cut into stretches, each about as long as all stretches before it. Each
stretch has its own clusters of k-means, which are fitted to training rows before it, and a row is compared with
earlier rows in the clusters of its stretch. So the duplicates among some rows depend on these rows alone: appended rows
change none of them, and only the appended rows have to be compared. A whole list costs about twice its last stretch.

The first stretch is small enough for one cluster: every pair in it is compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.data.curation.near_passes import CompareRows, FitClusters, MergeFound, ScatterRows
from pipeline.data.neighbours.blocks import (
    Block,
    SampleVectors,
    as_input,
    constants,
    cut_blocks,
    input_name,
    pass_task,
    run_pass,
)
from pipeline.graph.artifacts import Shard, ShardRow, write_shard_table
from pipeline.graph.stages import Context
from pipeline.graph.workers import ShardTask

# A change of any is a new version of curation.
FIRST_ROWS = 1 << 14  # of the first stretch
BLOCK_ROWS = 1 << 16  # that a worker holds
CLUSTER_ROWS = 256  # of the rows before a stretch, in one of its clusters
CLUSTER_SAMPLES = 16  # that a cluster is fitted to
MAX_CLUSTERS = 1 << 14
GROUP_ROWS = 1 << 14  # of the rows before a stretch, in one group of its clusters


@dataclass(frozen=True)
class Stretch:
    """The blocks of one stretch, and the numbers of rows and blocks before it."""

    blocks: tuple[Block, ...]
    rows_before: int
    blocks_before: int


def cut_stretches(judged: Sequence[ShardRow], embeddings: Mapping[int, ShardRow]) -> list[Stretch]:
    """Cuts shards with candidates into stretches of blocks; appended shards move no shard to another stretch or block.

    A stretch begins where the shards before it hold FIRST_ROWS, or twice, four times, ... as many.
    """
    parts: dict[int, list[ShardRow]] = {}
    starts: dict[int, int] = {}
    before = 0
    for shard in judged:
        if shard.kept:
            number = (before // FIRST_ROWS).bit_length()
            starts.setdefault(number, before)
            parts.setdefault(number, []).append(shard)
            before += shard.kept
    stretches: list[Stretch] = []
    count = 0
    for number, shards in parts.items():
        blocks = cut_blocks(shards, embeddings, BLOCK_ROWS, count)
        stretches.append(Stretch(tuple(blocks), starts[number], count))
        count += len(blocks)
    return stretches


def find_near_rows(ctx: Context, judged: Sequence[ShardRow], embeddings: Mapping[int, ShardRow]) -> dict[int, str]:
    """Returns, by the number of each shard with candidates, the blob of its rows that are too near to others."""
    stretches = cut_stretches(judged, embeddings)
    if not stretches:  # no row is left
        return {}
    blocks = [block for stretch in stretches for block in stretch.blocks]
    compared = _compare(ctx, stretches, blocks, _fit_clusters(ctx, stretches, blocks))
    said: dict[str, list[ShardRow]] = defaultdict(list)  # a group of clusters finds nothing in most blocks
    for shard in compared:
        for name in shard.blobs:
            said[name].append(replace(as_input(shard), blobs={name: shard.blobs[name]}))
    tasks = []
    for block in blocks:
        inputs = block.inputs() | {
            input_name("said", i): p for i, p in enumerate(said[input_name("block", block.number)])
        }
        tasks.append(pass_task(ctx, block.number, "merge", inputs))
    merged = run_pass(ctx, MergeFound(ctx.store), tasks, "verdicts")
    blobs: dict[int, str] = {}
    for block, shard in zip(blocks, merged, strict=True):
        blobs |= {curated.number: shard.blobs[input_name("shard", curated.number)] for curated, _ in block.shards}
    return blobs


def _fit_clusters(ctx: Context, stretches: Sequence[Stretch], blocks: Sequence[Block]) -> list[Shard]:
    """Fits the clusters of every stretch but the first, in order."""
    if len(stretches) < 2:
        return []
    samples: list[ShardTask] = []
    spans = []
    for stretch in stretches[1:]:
        clusters = min(MAX_CLUSTERS, -(-stretch.rows_before // CLUSTER_ROWS))
        given = constants(stride=max(1, stretch.rows_before // (clusters * CLUSTER_SAMPLES)))
        start = len(samples)
        for block in blocks[: stretch.blocks_before]:
            samples.append(pass_task(ctx, len(samples), "sample", block.inputs() | {"plan": given}))
        spans.append((clusters, slice(start, len(samples))))
    sampled = run_pass(ctx, SampleVectors(ctx.store), samples, "samples")
    tasks = []
    for number, (clusters, span) in enumerate(spans):
        inputs = {input_name("sample", i): as_input(shard) for i, shard in enumerate(sampled[span])}
        tasks.append(pass_task(ctx, number, "learn", inputs | {"plan": constants(clusters=clusters)}))
    return run_pass(ctx, FitClusters(ctx.store), tasks, "clusters", "stretches")


def _compare(
    ctx: Context, stretches: Sequence[Stretch], blocks: Sequence[Block], clusters: Sequence[Shard]
) -> list[Shard]:
    """Compares the rows in every group of clusters of every stretch."""
    scatters: list[ShardTask] = []
    spans = []
    for stretch, fitted in zip(stretches, (None, *clusters), strict=True):
        groups = 1 if fitted is None else -(-stretch.rows_before // GROUP_ROWS)
        start = len(scatters)
        for block in blocks[: stretch.blocks_before + len(stretch.blocks)]:
            given = constants(groups=groups, looks=block.number >= stretch.blocks_before)
            inputs = block.inputs() | {"plan": given} | ({} if fitted is None else {"clusters": as_input(fitted)})
            scatters.append(pass_task(ctx, len(scatters), "scatter in pieces", inputs))
        spans.append((groups, slice(start, len(scatters))))
    scattered = run_pass(ctx, ScatterRows(ctx.store), scatters, "rows by cluster")
    tasks: list[ShardTask] = []
    for groups, span in spans:
        # A table, not an input for each block: those would be as many as blocks times groups.
        parts = [replace(shard, number=number) for number, shard in enumerate(scattered[span])]
        table, _ = write_shard_table(ctx.store, parts)
        listed = ShardRow(0, table, 0, 0, {"blocks": table}, {})
        for group in range(groups):
            tasks.append(pass_task(ctx, len(tasks), "compare", {"blocks": listed, "plan": constants(group=group)}))
    worker = CompareRows(ctx.store, ctx.recipe.near_duplicate, ctx.recipe.near_held_out)
    return run_pass(ctx, worker, tasks, "neighbours", "groups of clusters")
