"""Makes pairs: images fetched, checked, resized, and packed into webdataset tars with an index, shard by shard.

Captions stay apart, so that new captions never fetch an image again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from pipeline.data.content import put_content
from pipeline.data.fetch.rules import read_deny_lists
from pipeline.data.pairs.earlier import earlier_shards
from pipeline.data.pairs.recipe import PairsRecipe
from pipeline.data.source.lists import path_policy, serving_lists
from pipeline.data.source.recipe import SourceRecipe
from pipeline.graph.artifacts import Artifact, read_shards
from pipeline.graph.shards import map_shards
from pipeline.graph.stages import Context, Stage, shard_key
from pipeline.graph.workers import ShardTask
from pipeline.settings import PairsSettings
from pipeline.store import Store

if TYPE_CHECKING:
    from pipeline.data.pairs.packer import Packer

LONG = 16  # shards of a list that is worth a process where workers share what they know of sites
# Time of the worker and its decoder; waiting for dead links takes none, as others are asked meanwhile.
ROW_SECONDS = 0.02
BYTES_A_PIXEL = 0.25  # of a stored image, as wide as it is high


def run_pairs(ctx: Context) -> Artifact:
    """Fetches and packs every source shard. Drawings are served from this machine while the stage runs."""
    earlier = earlier_shards(ctx)
    tasks = [
        ShardTask(
            shard.number, shard_key(ctx, {"source": shard.key}), {"source": shard, **earlier.get(shard.number, {})}
        )
        for shard in read_shards(ctx.store, ctx.inputs["source"])
    ]
    with packing(ctx.store, ctx.recipe, ctx.settings, ctx.given) as pack:
        rows = ctx.inputs["source"].ledger.rows
        make = partial(pack, shares=len(tasks) >= LONG)
        return map_shards(ctx, tasks, make, "rows", rows, at_once=shards_at_once(rows / max(1, len(tasks))))


@contextmanager
def packing(
    store: Store, recipe: PairsRecipe, settings: PairsSettings, source: SourceRecipe
) -> Iterator[Callable[..., Packer]]:
    """Runs the servers that lists bring along as long as the block lasts; yields what makes a ``Packer``.

    It takes ``shares``. Raises UserError for a deny list that cannot be read, before anything is asked for.
    """
    from pipeline.data.pairs.packer import Packer

    may = path_policy(source, *source.paths)
    for name in ("deny_hosts", "deny_urls", "deny_sha256"):
        if file := getattr(recipe, name):
            put_content(store, file, f"pairs.{name}")
    read_deny_lists(store, *recipe.deny_lists)
    with serving_lists(source.paths, settings.hosts) as hosts:
        yield partial(Packer, store, recipe, replace(settings, hosts=dict(hosts)), may)


def shards_at_once(shard_rows: float) -> int:
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
    row_seconds=lambda *_: ROW_SECONDS,
    row_bytes=lambda recipe, *_: BYTES_A_PIXEL * recipe.image_size**2,
)
