"""Artefacts and shards: the results of stages in the store, published and read back."""

from __future__ import annotations

import io
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from pipeline.errors import CorruptObject
from pipeline.graph.records import Artifact, Shard, artifact_path, shard_path
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.crash import crash_point
from pipeline.store.names import Digest, FileName, Part
from pipeline.store.records import Count, blob_path, create_record, put_blob, read_blob, read_record, said, whoami

StageKey = tuple[str, str]  # a stage and a key
NOTE = "note."  # prefix of blobs that are beside the result, such as times: an artefact's table leaves them out
PACKAGES = (
    "ray", "torch", "open_clip_torch", "img2dataset", "opencv-python-headless", "numpy", "pyarrow", "pillow",
    "scikit-learn", "faiss-cpu",
)  # fmt: skip
GROUP = 8192  # shards of a table in one row group
SEGMENTS = "shards/source/segment-"  # prefix of the paths of records of a list's segments


def is_preview(name: str) -> bool:
    """Returns whether a file of a model's artefact is a preview, which shows validation images."""
    return name == "preview.png" or name.startswith("previews/")


def publish_shard(
    store: Store,
    stage: str,
    number: int,
    key: str,
    ledger: Ledger,
    blobs: Mapping[str, bytes | Path],
    counts: Mapping[str, int],
    inputs: Mapping[str, str] = MappingProxyType({}),
) -> Shard:
    """Stores a shard's blobs and then its record. Returns the stored shard, which may be another worker's."""
    # The record last: if it is there, so are its blobs, wherever this process is killed.
    names = {name: put_blob(store, data) for name, data in sorted(blobs.items())}
    path = shard_path(stage, key)
    crash_point("shard.before_record", path)
    shard = create_record(store, path, Shard(number, key, ledger, names, dict(counts), dict(inputs)))
    crash_point("shard.after_record", path)
    return shard


def read_shard(store: Store, stage: str, key: str) -> Shard | None:
    """Returns a finished shard, or None if it has still to be made."""
    return read_record(store, shard_path(stage, key), Shard)


def environment() -> dict[str, str]:
    """Returns versions that the bytes of a result may depend on besides its recipe. Recorded, never hashed."""
    return {"python": platform.python_version(), "machine": platform.machine()} | {p: version(p) for p in PACKAGES}


def publish_artifact(store: Store, artifact: Artifact, seconds: float) -> Artifact:
    """Creates the record of an artefact whose blobs are in the store. Returns the stored one, maybe another's."""
    crash_point("artifact.before_record", artifact_path(artifact.stage, artifact.key))
    times = {"finished": time.time(), "seconds": seconds, **artifact.times}
    record = replace(artifact, environment={**environment(), **artifact.environment}, times=times, by=whoami())
    stored = create_record(store, artifact_path(artifact.stage, artifact.key), record)
    crash_point("artifact.after_record", artifact_path(artifact.stage, artifact.key))
    return stored


def load_artifact(store: Store, stage: str, key: str) -> Artifact | None:
    """Returns a finished artefact, or None."""
    return read_record(store, artifact_path(stage, key), Artifact)


def keys_of(store: Store, stage: str, start: str = "") -> list[str]:
    """Returns the keys of all finished artefacts of a stage that begin with ``start``. Reads none of them."""
    folder = f"artifacts/{stage}/"
    return [entry.path.removeprefix(folder).removesuffix(".json") for entry in store.list(folder + start)]


def made_with(store: Store, stage: str, name: str, key: str) -> list[Artifact]:
    """Returns the finished artefacts of a stage whose input ``name`` has a key, newest first. Reads all its records."""
    found = (load_artifact(store, stage, own) for own in keys_of(store, stage))
    made = [artifact for artifact in found if artifact is not None and artifact.inputs.get(name) == key]
    return sorted(made, key=lambda artifact: artifact.times["finished"], reverse=True)


def ancestors(store: Store, artifact: Artifact) -> Iterator[Artifact]:
    """Yields an artefact and all that it was made from, each once, the nearest first, and skips what was deleted."""
    queue, seen = [artifact], {(artifact.stage, artifact.key)}
    for made in queue:
        yield made
        # In reverse, so that at equal distance the pinned clip and codec come last: what is behind them may be older.
        for inputs in sorted(made.inputs.items(), reverse=True):
            if inputs not in seen:
                seen.add(inputs)
                if (found := load_artifact(store, *inputs)) is not None:
                    queue.append(found)


# --- tables, and the list of an artefact's shards ---------------------------------------------------------------------


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
    # Not pq.read_table: it starts threads of Arrow, which abort the process if they are busy when a command ends.
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
    """Holds a row of an artefact's table of shards; ``kept`` and ``lost`` count the shard's rows."""

    number: Count
    key: Part
    kept: Count
    lost: Count
    blobs: Mapping[FileName, Digest]
    counts: Mapping[str, Count]


_SHARD_ROW = TypeAdapter(ShardRow)


class ShardList:
    """The shards of an artefact, in order of their numbers (``numbers``, int64 [shards]), as columns in memory.

    Raises:
        CorruptObject: when the table is not a list of shards.
    """

    def __init__(self, store: Store, artifact: Artifact):
        if artifact.shard_table is None:
            raise ValueError(f"{artifact.stage} has no shards")
        self._blob = artifact.shard_table
        with self._checked():
            self._table = read_table(store, self._blob).combine_chunks()
            self.numbers = self._table["number"].to_numpy()

    def __len__(self) -> int:
        return len(self.numbers)

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
        place = int(self.numbers.searchsorted(number))
        return self[place] if place < len(self) and self.numbers[place] == number else None

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
            why = said(e) if isinstance(e, ValueError) else e
            raise CorruptObject(blob_path(self._blob), f"is not a list of shards ({why})") from None


def read_shards(store: Store, artifact: Artifact) -> list[ShardRow]:
    """Returns the shards of an artefact in order of their numbers. Raises CorruptObject."""
    return ShardList(store, artifact).rows()


def _rows(table: pa.Table) -> Iterator[ShardRow]:
    # Interned: a table of 100,000 shards would hold as many copies of each name.
    blobs, counts = (
        {name: sys.intern(name.removeprefix(kind)) for name in table.column_names if name.startswith(kind)}
        for kind in ("blob.", "count.")
    )
    for row in table.to_pylist():
        yield _SHARD_ROW.validate_python(
            {
                "number": row["number"],
                "key": row["key"],
                "kept": row["kept"],
                "lost": row["rejected"] + row["deferred"],
                "blobs": {name: row[column] for column, name in blobs.items() if row[column] is not None},
                "counts": {name: row[column] for column, name in counts.items()},
            }
        )
