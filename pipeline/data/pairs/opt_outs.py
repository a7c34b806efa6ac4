"""Evidence: for each row that a site, or a deny list, keeps out, what said so and when it was seen.

It has times, so it is a note beside a shard's result: the shard's record names it, the artefact's table does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.data.fetch.references import shown
from pipeline.graph.artifacts import NOTE, read_shard
from pipeline.graph.shard_tables import ShardRow, read_table, write_table
from pipeline.store import Store
from pipeline.terminal import printable

OPT_OUTS = f"{NOTE}opt_outs"


def opt_out_table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns Parquet of rows whose ``evidence`` is an opener.Evidence; ``seen`` in milliseconds, UTC.

    It is there to be read by people: what a site said cannot control their terminal, and references are as shown.
    """
    import pyarrow as pa

    columns: dict[str, Any] = {name: pa.array([row[name] for row in rows]) for name in ("key", "url", "reason")}
    columns["url"] = pa.array([shown(row["url"]) for row in rows])
    columns["evidence"] = pa.array([printable(row["evidence"].text) for row in rows])
    seen = [round(1000 * row["evidence"].seen) for row in rows]
    columns["seen"] = pa.array(seen, pa.timestamp("ms", "UTC"))
    return write_table(columns)


def read_opt_outs(store: Store, shards: Iterable[ShardRow]) -> Iterator[dict[str, Any]]:
    """Every opted-out or denied row of shards of pairs, in order: key, url, reason, evidence, and ``seen``, a datetime.

    Raises CorruptObject for evidence that is missing or damaged.
    """
    for row in shards:
        shard = read_shard(store, "pairs", row.key)
        if shard is not None and OPT_OUTS in shard.blobs:
            yield from read_table(store, shard.blobs[OPT_OUTS]).to_pylist()
