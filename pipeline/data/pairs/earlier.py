"""Takes over from an earlier run what it made of the references that a shard still has, without fetching them again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.data.fetch.opener import Evidence
from pipeline.data.pairs.row_index import Place, read_images, read_opt_outs
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import ShardRow, read_shards, read_table
from pipeline.graph.runs import last_made
from pipeline.graph.stages import Context
from pipeline.store import Store

READ = 64  # images in memory at once
TAKEN_OVER = ("status", "reason", "width", "height", "sha256", "tar", "offset", "size")  # of the earlier index
log = logging.getLogger("unclip")


def earlier_shards(ctx: Context) -> dict[int, dict[str, ShardRow]]:
    """Returns, by number, the shards of source and pairs that the last run with the same recipe made.

    Addresses that it did not allow may be allowed now. Returns none if they are gone or damaged.
    """
    try:
        made = last_made(ctx, ("source",), besides=("allow",))
        if made is None:
            return {}
        source = {shard.number: shard for shard in read_shards(ctx.store, made["source"])}
        return {
            pairs.number: {"earlier source": source[pairs.number], "earlier pairs": pairs}
            for pairs in read_shards(ctx.store, made[ctx.stage])
        }
    except CorruptObject as e:
        log.warning("all rows are fetched again, because the earlier run's are damaged: %s", e)
        return {}


def take_over(
    store: Store, refs: Sequence[Mapping[str, Any]], source: ShardRow, pairs: ShardRow, wanted: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any], bytes | None]]:
    """Yields those rows at the ``wanted`` places that the earlier shard had too, as the same version of their images.

    Each comes as its place, what the earlier run found out about it, and its image, unless that lies in a tar of the
    user's. Ends where what the earlier run made is gone or damaged.
    """
    try:
        before = read_table(store, source.blobs["refs"]).to_pylist()
        index = read_table(store, pairs.blobs["index"]).to_pylist()
        said = {row["key"]: Evidence(row["evidence"], row["seen"].timestamp()) for row in read_opt_outs(store, [pairs])}
        there = {
            _wanted(ref): i
            for i, ref in enumerate(before)
            # Another recipe may allow the address.
            if not ref["reject"] and index[i]["reason"] != "forbidden_address"
        }
        same = [i for i in wanted if _wanted(refs[i]) in there]
        for start in range(0, len(same), READ):
            rows = {i: index[there[_wanted(refs[i])]] for i in same[start : start + READ]}
            own = {i: row for i, row in rows.items() if row["tar"] is None and row["size"] is not None}
            images = read_images(store, [Place.of(row, pairs.blobs.get("images")) for row in own.values()])
            image_of = dict(zip(own, images, strict=True))
            for i, row in rows.items():
                found = {name: row[name] for name in TAKEN_OVER} | {"evidence": said.get(row["key"])}
                yield i, found, image_of.get(i)
    except CorruptObject as e:
        log.warning("rows of shard %08d are fetched again, because the earlier run's are damaged: %s", pairs.number, e)


def _wanted(ref: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns what is asked for: the reference, its hash, and the version and the try that keys count."""
    return ref["url"], ref["sha256"], ref.get("counted") or ""
