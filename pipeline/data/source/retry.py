"""Gathers rows whose fetch failed, to be tried again, from the ledger into a segment of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipeline.data.source.journal import reference_mark
from pipeline.data.source.recipe import FIRST_RETRY
from pipeline.data.source.rows import put_rows, stored_rows
from pipeline.data.source.source import ListRow
from pipeline.data.source.stage import SourceShard, segment_of
from pipeline.graph.artifacts import Artifact, read_shards, read_table
from pipeline.local import PathPolicy
from pipeline.store import Store

# How a row may end that another try would only repeat, or that asked not to be tried.
FINAL = frozenset(["malformed_row", "not_utf8", "no_reference", "duplicate_url", "forgotten", "opted_out", "denied"])


def gather(
    store: Store, source: Sequence[SourceShard], pairs: Artifact, reasons: frozenset[str], reaches: Sequence[PathPolicy]
) -> tuple[str | None, int]:
    """Stores the rows whose last try ended with one of ``reasons``, as the Parquet blob of a segment.

    Splits that the list does not name are drawn again, whatever the shares are by then, so that a group stays on one
    side. One shard is in memory at a time.

    Args:
        store: Store of the list.
        source: The stored shards of the list that ``pairs`` was made from.
        pairs: Artefact that says how rows ended.
        reasons: Reasons of the ledger for which rows are tried again.
        reaches: Files and buckets that each of the lists may name.

    Returns:
        The blob, None without a row, and the number of rows.
    """
    return put_rows(store, _failed(store, source, pairs, reasons, reaches))


def _failed(
    store: Store, source: Sequence[SourceShard], pairs: Artifact, reasons: frozenset[str], reaches: Sequence[PathPolicy]
) -> Iterator[ListRow]:
    tried = _tried(store, source)
    for listed, shard in zip(source, read_shards(store, pairs), strict=True):
        if not shard.lost:
            continue
        ended = read_table(store, shard.blobs["index"], ["reason"])["reason"].to_pylist()
        table = read_table(store, listed.refs)
        # What a list may not name stays refused, unless all lists may: as rows to be tried again they would be judged
        # by what any list may name. A link may lead elsewhere by now, and the fetch judges it.
        refused = [
            why is not None and (why != "forbidden_reference" or any(may.refusal(url) for may in reaches))
            for why, url in zip(table["reject"].to_pylist(), table["url"].to_pylist(), strict=True)
        ]
        places = [i for i, reason in enumerate(ended) if reason in reasons and not refused[i]]
        if not places:
            continue
        captions = read_table(store, listed.captions, ["captions"])
        for row in stored_rows(table.take(places), captions.take(places)):
            if tried.get(reference_mark(row.url), 0) <= segment_of(shard.number):
                yield replace(row, reject=None)


def _tried(store: Store, source: Sequence[SourceShard]) -> dict[str, int]:
    """Returns the last segment in which each reference was tried again."""
    tried: dict[str, int] = {}
    for shard in source:
        if segment_of(shard.number) >= FIRST_RETRY:
            for url in read_table(store, shard.refs, ["url"])["url"].to_pylist():
                tried[reference_mark(url)] = segment_of(shard.number)
    return tried
