"""Takes over from an earlier run what it made of the references that a shard still has, without fetching them again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from pipeline.data.fetch.opener import Evidence
from pipeline.data.pairs.row_index import Place, read_images, read_opt_outs
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import ShardRow, read_shards, read_table
from pipeline.graph.runs import last_made
from pipeline.graph.stages import Context
from pipeline.store import Store

READ = 64  # images in memory at once
log = logging.getLogger("unclip")


class Spooled(NamedTuple):
    """An image in a temporary file."""

    file: IO[bytes]
    start: int
    size: int

    def read(self) -> bytes:
        """Returns its bytes."""
        self.file.seek(self.start)
        return self.file.read(self.size)


@dataclass(frozen=True)
class EarlierRow:
    """Holds how a row ended.

    Attributes:
        row: Row of the earlier index.
        image: Image of the row, unless that lies in a tar of the user's.
        evidence: Evidence of an opt-out; None where there was none.
    """

    row: Mapping[str, Any]
    image: Spooled | None
    evidence: Evidence | None


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
        log.warning("everything is fetched from scratch: of an earlier run, %s", e)
        return {}


def take_over(
    store: Store, refs: Sequence[Mapping[str, Any]], source: ShardRow, pairs: ShardRow, spool: IO[bytes]
) -> dict[int, EarlierRow]:
    """Returns, by place, the rows of ``refs`` that stood there in the earlier shard too, with the same hash.

    Their images are written to ``spool``, since memory does not hold those of a large shard. Returns none if what the
    earlier run made is gone or damaged.
    """
    try:
        before = read_table(store, source.blobs["refs"]).to_pylist()
        index = read_table(store, pairs.blobs["index"]).to_pylist()
        same = [
            i
            for i, (now, then) in enumerate(zip(refs, before, strict=False))
            if not now["reject"]
            and not then["reject"]
            and all(now[k] == then[k] for k in ("url", "sha256"))
            # Another recipe may allow the address.
            and index[i]["reason"] != "forbidden_address"
        ]
        own = [i for i in same if index[i]["tar"] is None and index[i]["size"] is not None]
        images = {}
        for start in range(0, len(own), READ):
            part = own[start : start + READ]
            places = [Place.of(index[i], pairs.blobs.get("images")) for i in part]
            for i, image in zip(part, read_images(store, places), strict=True):
                images[i] = Spooled(spool, spool.tell(), len(image))
                spool.write(image)
        said = {row["key"]: Evidence(row["evidence"], row["seen"].timestamp()) for row in read_opt_outs(store, [pairs])}
    except CorruptObject as e:
        log.warning("shard %08d is fetched from scratch: of an earlier run, %s", pairs.number, e)
        return {}
    return {i: EarlierRow(index[i], images.get(i), said.get(index[i]["key"])) for i in same}
