"""Parquet tables in the store, among them the list of an artefact's shards."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import NOTE, Artifact, Shard
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.names import check_blobs, is_part
from pipeline.store.records import blob_path, put_blob, read_blob

GROUP = 8192  # shards of a table in one row group


def write_table(columns: Mapping[str, object] | pa.Table, dictionary: bool = True, group: int | None = None) -> bytes:
    """Returns Parquet bytes of columns of one length: equal columns give equal bytes.

    Without ``dictionary``, numbers that hardly repeat are read four times as fast. A reader of batches holds ``group``
    rows at a time, by default a million.
    """
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", store_schema=False, use_dictionary=dictionary, row_group_size=group)
    return out.getvalue()


def read_table(store: Store, blob: str, columns: list[str] | None = None) -> pa.Table:
    """Reads a Parquet blob."""
    # Not pq.read_table: it starts threads of Arrow's, and where they are still busy when a command ends they abort it.
    return pq.ParquetFile(pa.BufferReader(read_blob(store, blob))).read(columns=columns, use_threads=False)


def write_shard_table(store: Store, shards: Iterable[Shard]) -> tuple[str, Ledger]:
    """Stores the list of an artefact's shards, ordered by number. Returns its blob and the sum of the ledgers."""
    ordered = sorted(shards, key=lambda shard: shard.number)
    ledgers = [shard.ledger for shard in ordered]
    columns = {
        "number": pa.array([shard.number for shard in ordered], pa.int64()),
        "key": pa.array([shard.key for shard in ordered], pa.string()),
        "kept": pa.array([ledger.kept for ledger in ledgers], pa.int64()),
        "rejected": pa.array([sum(ledger.rejected.values()) for ledger in ledgers], pa.int64()),
        "deferred": pa.array([sum(ledger.deferred.values()) for ledger in ledgers], pa.int64()),
    }
    for name in sorted({name for shard in ordered for name in shard.blobs if not name.startswith(NOTE)}):
        columns[f"blob.{name}"] = pa.array([shard.blobs.get(name) for shard in ordered], pa.string())
    for name in sorted({name for shard in ordered for name in shard.counts}):
        columns[f"count.{name}"] = pa.array([shard.counts.get(name, 0) for shard in ordered], pa.int64())
    return put_blob(store, write_table(columns, group=GROUP)), sum(ledgers, Ledger())


@dataclass(frozen=True, slots=True)
class ShardRow:
    """A shard as an artefact's table lists it, with its numbers of kept rows, and of others."""

    number: int
    key: str
    kept: int
    lost: int
    blobs: Mapping[str, str]
    counts: Mapping[str, int]


class ShardList:
    """The shards of an artefact, in order of their numbers, as columns in memory.

    Raises:
        CorruptObject: when the table is not a list of shards.
    """

    def __init__(self, store: Store, artifact: Artifact):
        if artifact.shard_table is None:
            raise ValueError(f"{artifact.stage} has no shards")
        self._blob = artifact.shard_table
        with self._checked():
            self._table = read_table(store, self._blob).combine_chunks()
            self._numbers = self._table["number"].to_numpy()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> ShardRow:
        """Returns a shard by its place. Raises IndexError behind the end."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        with self._checked():
            (row,) = _rows(self._table.slice(place, 1))
        return row

    def rows(self) -> list[ShardRow]:
        """Returns all shards."""
        with self._checked():
            return list(_rows(self._table))

    def find(self, number: int) -> ShardRow | None:
        """Returns the shard of this number, if it is listed."""
        place = int(self._numbers.searchsorted(number))
        return self[place] if place < len(self) and self._numbers[place] == number else None

    def counts(self, name: str) -> np.ndarray:
        """Returns this count of every shard, int64 [shards]; 0 where a shard does not have it."""
        column = f"count.{name}"
        return self._table[column].to_numpy() if column in self._table.column_names else np.zeros(len(self), np.int64)

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Raises CorruptObject for a table that is not a list of shards, or names what no record may name.

        Like a record, it may come from anybody who can write to the store.
        """
        try:
            yield
        except (ValueError, KeyError, TypeError) as e:
            raise CorruptObject(blob_path(self._blob), f"is not a list of shards ({e})") from None


def read_shards(store: Store, artifact: Artifact) -> list[ShardRow]:
    """Returns the shards of an artefact in order of their numbers. Raises CorruptObject."""
    return ShardList(store, artifact).rows()


def _rows(table: pa.Table) -> Iterator[ShardRow]:
    # One string a name, not one for each shard.
    blobs, counts = (
        {name: sys.intern(name.removeprefix(kind)) for name in table.column_names if name.startswith(kind)}
        for kind in ("blob.", "count.")
    )
    for row in table.to_pylist():
        shard = ShardRow(
            row["number"],
            row["key"],
            row["kept"],
            row["rejected"] + row["deferred"],
            {name: row[column] for column, name in blobs.items() if row[column] is not None},
            {name: row[column] for column, name in counts.items()},
        )
        check_blobs(shard.blobs)
        numbers = (shard.number, shard.kept, shard.lost, *shard.counts.values())
        if not is_part(shard.key) or not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"shard {shard.number!r}, key {shard.key!r}")
        yield shard
