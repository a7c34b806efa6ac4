"""Gathers rows whose fetch failed, to be tried again in their places by the next run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.data.source.duplicates import HASH, Hashes
from pipeline.data.source.journal import reference_mark
from pipeline.data.source.segments import SourceShard
from pipeline.graph.artifacts import Artifact, read_shards, read_table
from pipeline.local import PathPolicy
from pipeline.store import Store
from pipeline.store.records import put_blob, read_blob

# How a row may end that another try would only repeat, or that asked not to be tried.
FINAL = frozenset(["malformed_row", "not_utf8", "no_reference", "duplicate_url", "forgotten", "opted_out", "denied"])


@dataclass(frozen=True)
class Retries:
    """Says which references are tried again, by blobs of ``gather``, which are read when they are needed."""

    store: Store
    blobs: tuple[str, ...]

    def times(self, references: Sequence[str]) -> list[int]:
        """Returns how many times each of some references is tried again, 0 for "". Raises CorruptObject."""
        times = np.zeros(len(references), np.int64)
        if self.blobs:
            named = np.array([bool(reference) for reference in references], np.bool_)
            marks = np.fromiter(map(_short_mark, references), HASH, len(references))
            for tried in self._marks:
                place = np.minimum(np.searchsorted(tried, marks), len(tried) - 1)
                times += named & (tried[place] == marks)
        return [*map(int, times)]

    @cached_property
    def _marks(self) -> list[Hashes]:
        """Returns for each time the first 64 bits of marks of references, sorted."""
        data = [read_blob(self.store, blob) for blob in self.blobs]
        # An older version has put tables there: what else is older of that store says so.
        return [np.frombuffer(each, HASH) for each in data if each and len(each) % HASH.itemsize == 0]


def gather(
    store: Store, source: Sequence[SourceShard], pairs: Artifact, reasons: frozenset[str], reaches: Sequence[PathPolicy]
) -> tuple[str | None, int]:
    """Stores which rows ended with one of ``reasons``, as a blob for ``Retries``. One shard is in memory at a time.

    Args:
        store: Store of the list.
        source: The stored shards of the list that ``pairs`` was made from.
        pairs: Artefact that says how rows ended.
        reasons: Reasons of the ledger for which rows are tried again.
        reaches: Files and buckets that each of the lists may name.

    Returns:
        The blob, None without a row, and the number of rows.
    """
    marks = np.fromiter(_failed(store, source, pairs, reasons, reaches), HASH)
    return (put_blob(store, np.unique(marks).tobytes()) if len(marks) else None), len(marks)


def _failed(
    store: Store, source: Sequence[SourceShard], pairs: Artifact, reasons: frozenset[str], reaches: Sequence[PathPolicy]
) -> Iterator[int]:
    for listed, shard in zip(source, read_shards(store, pairs), strict=True):
        if not shard.lost:
            continue
        ended = read_table(store, shard.blobs["index"], ["reason"])["reason"].to_pylist()
        table = read_table(store, listed.refs, ["url", "reject"])
        for reason, why, url in zip(ended, table["reject"].to_pylist(), table["url"].to_pylist(), strict=True):
            # What a list may not name stays refused, unless all lists may: a link may lead elsewhere by now.
            refused = why is not None and (why != "forbidden_reference" or any(may.refusal(url) for may in reaches))
            if reason in reasons and not refused:
                yield _short_mark(url)


def _short_mark(reference: str) -> int:
    return int(reference_mark(reference)[:16], 16)
