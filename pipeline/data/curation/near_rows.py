"""Finds near-duplicates and leaks over all shards: passes of workers around ``neighbours``, in bounded memory.

Rows come in the order of their keys. They are cut into stretches, each about as long as all stretches before it. Each
stretch has its own clusters of k-means, which are fitted to training rows before it, and a row is compared with
earlier rows in the clusters of its stretch. So the duplicates among some rows depend on these rows alone: appended rows
change none of them, and only the appended rows have to be compared. A whole list costs about twice its last stretch.

The first stretch is small enough for one cluster: every pair in it is compared.

Rows meet by two exchanges: blocks to groups of clusters, and groups of clusters, with what they found, to ranges of
blocks. So objects and requests grow with the rows, and the driver sees names of blobs, whatever is found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from pipeline.data.curation.near_passes import CompareRows, FitClusters, MergeFound, ScatterRows
from pipeline.data.neighbours.blocks import (
    Block,
    SampleVectors,
    as_input,
    constants,
    cut_blocks,
    input_name,
    number_of,
    pass_task,
    run_pass,
)
from pipeline.data.neighbours.exchange import Fan, exchange
from pipeline.data.neighbours.work import CLUSTER_ROWS, MAX_CLUSTERS
from pipeline.graph.artifacts import Shard, ShardRow
from pipeline.graph.stages import Context
from pipeline.graph.workers import ShardTask

# A change of any of these is a new version of curation.
FIRST_ROWS = 1 << 14  # of the first stretch
BLOCK_ROWS = 1 << 16  # that a worker holds
CLUSTER_SAMPLES = 16  # that a cluster is fitted to
# These change no verdict, only what a worker holds in memory and how many objects and requests there are.
GROUP_ROWS = 1 << 15  # of the rows before a stretch, in one group of its clusters
RANGE_BLOCKS = 8  # whose verdicts are one task
ROWS_FAN = Fan(packs=96, parts=192)  # a merge writes all rows once more, so a billion have one
FOUND_FAN = Fan(packs=64, parts=8)  # what is found is small


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
    """Returns, by the number of each shard that has rows too near to others, the blob of these rows."""
    stretches = cut_stretches(judged, embeddings)
    if not stretches:  # no row is left
        return {}
    blocks = [block for stretch in stretches for block in stretch.blocks]
    clusters = _fit_clusters(ctx, stretches, blocks)
    found = _compare(ctx, stretches, _scatter(ctx, stretches, blocks, clusters))
    tasks = []
    for number, members in groupby(blocks, _range):
        inputs = {input_name("judged", shard.number): shard for block in members for shard, _ in block.shards}
        inputs |= {input_name("found", i): ranges[number] for i, ranges in enumerate(found) if number < len(ranges)}
        tasks.append(pass_task(ctx, number, "verdicts", inputs))
    merged = run_pass(ctx, MergeFound(ctx.store), tasks, "verdicts", "ranges of rows")
    return {number_of(name): blob for shard in merged for name, blob in shard.blobs.items()}


def _range(block: Block) -> int:
    return block.number // RANGE_BLOCKS


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


def _scatter(
    ctx: Context, stretches: Sequence[Stretch], blocks: Sequence[Block], clusters: Sequence[Shard]
) -> list[list[ShardRow]]:
    """Brings the rows of every stretch and of all before it to its groups of clusters."""
    tasks: list[ShardTask] = []
    spans = []
    for stretch, fitted in zip(stretches, (None, *clusters), strict=True):
        groups = 1 if fitted is None else min(MAX_CLUSTERS, -(-stretch.rows_before // GROUP_ROWS))
        start = len(tasks)
        for block in blocks[: stretch.blocks_before + len(stretch.blocks)]:
            given = constants(groups=groups, looks=block.number >= stretch.blocks_before, range=_range(block))
            inputs = block.inputs() | {"plan": given} | ({} if fitted is None else {"clusters": as_input(fitted)})
            tasks.append(pass_task(ctx, len(tasks), "scatter", inputs))
        spans.append((slice(start, len(tasks)), groups))
    packs = run_pass(ctx, ScatterRows(ctx.store), tasks, "rows by cluster", "blocks")
    return exchange(ctx, [(packs[span], groups) for span, groups in spans], ROWS_FAN, "merges of rows")


def _compare(ctx: Context, stretches: Sequence[Stretch], groups: Sequence[Sequence[ShardRow]]) -> list[list[ShardRow]]:
    """Compares the rows in every group of clusters of every stretch, and brings what is found to ranges of blocks."""
    tasks: list[ShardTask] = []
    spans = []
    for stretch, rows in zip(stretches, groups, strict=True):
        ranges = _range(stretch.blocks[-1]) + 1
        start = len(tasks)
        for group in rows:
            tasks.append(pass_task(ctx, len(tasks), "compare", {"packs": group, "plan": constants(ranges=ranges)}))
        spans.append((slice(start, len(tasks)), ranges))
    worker = CompareRows(ctx.store, ctx.recipe.near_duplicate, ctx.recipe.near_held_out)
    packs = run_pass(ctx, worker, tasks, "neighbours", "groups of clusters")
    return exchange(ctx, [(packs[span], ranges) for span, ranges in spans], FOUND_FAN, "merges of neighbours")
