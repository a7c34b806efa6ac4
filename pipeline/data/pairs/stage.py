"""Makes pairs: images fetched, checked, resized, and packed into webdataset tars with an index, shard by shard.

Captions stay apart, so that new captions never fetch an image again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from pipeline.data.content import put_content
from pipeline.data.fetch.rules import read_deny_lists
from pipeline.data.pairs.earlier import earlier_shards
from pipeline.data.pairs.recipe import PairsRecipe
from pipeline.data.source.lists import path_policy, serving_lists
from pipeline.graph.artifacts import Artifact, read_shards
from pipeline.graph.shards import map_shards
from pipeline.graph.stages import Context, Stage, shard_key
from pipeline.graph.workers import ShardTask
from pipeline.settings import PairsSettings

LONG = 16  # shards of a list that is worth a process where workers share what they know of sites
BYTES_A_PIXEL = 0.25  # of a stored image, as wide as it is high


def run_pairs(ctx: Context) -> Artifact:
    """Fetches and packs every source shard. Drawings are served from this machine while the stage runs."""
    from pipeline.data.pairs.packer import Packer

    earlier = earlier_shards(ctx)
    tasks = [
        ShardTask(
            shard.number, shard_key(ctx, {"source": shard.key}), {"source": shard, **earlier.get(shard.number, {})}
        )
        for shard in read_shards(ctx.store, ctx.inputs["source"])
    ]
    may = path_policy(ctx.given, *ctx.given.paths)
    for name in ("deny_hosts", "deny_urls", "deny_sha256"):
        if file := getattr(ctx.recipe, name):
            put_content(ctx.store, file, f"pairs.{name}")
    read_deny_lists(ctx.store, *ctx.recipe.deny_lists)  # a mistake in one is found before anything is asked for
    with serving_lists(ctx.given.paths, ctx.settings.hosts) as hosts:
        settings = replace(ctx.settings, hosts=hosts)
        rows = ctx.inputs["source"].ledger.rows
        make = partial(Packer, ctx.store, ctx.recipe, settings, may, shares=len(tasks) >= LONG)
        return map_shards(ctx, tasks, make, "rows", rows, at_once=_at_once(rows / max(1, len(tasks))))


def _at_once(shard_rows: float) -> int:
    """Returns how many shards a worker has under way, so that it never only waits for the last answers of one.

    While it does, for as long as a dead link may take, and uploads, it asks for the next ones: some 8,000 rows.
    """
    return max(2, min(8, round(8000 / max(1, shard_rows))))


PAIRS = Stage(
    "pairs",
    version=7,
    recipe=PairsRecipe,
    inputs=("source",),
    run=run_pairs,
    settings=PairsSettings,
    given=lambda config: config.source,  # for paths that rows may name
    counts_list=True,
    row_seconds=0.02,  # of the worker and its decoder; waiting for dead links takes none, as others are asked meanwhile
    row_bytes=lambda recipe, *_: BYTES_A_PIXEL * recipe.image_size**2,
)
