"""Artefacts and shards: what a stage leaves in the store, and how to read it back."""

from __future__ import annotations

import io
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Lock
from typing import Any

from pipeline.errors import CorruptObject
from pipeline.graph.damage import create_record, read_record
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.crash import crash_point
from pipeline.store.identity import whoami
from pipeline.store.names import check_blobs, is_part
from pipeline.store.records import blob_path, put_blob, read_blob

NOTE = "note."  # begins the names of blobs that a shard's record names and an artefact's table does not
THREADS = 16  # records are small, and each is a request
GROUP = 8192  # shards of a table that lie together
SCRATCH = "unclip-shards-"  # begins the names of temporary files
WINDOW = 512  # shards that are held as objects while many are read or listed


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of an artefact. Blobs called ``note.`` are beside the result, such as times: made again, a shard may
    have others. ``counts`` are sums that later stages need without opening a blob."""

    number: int
    key: str
    ledger: Ledger
    blobs: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """An immutable result. ``blobs`` maps file names to sha256; ``shard_table`` is the blob that lists its shards.
    ``requests``: what making it asked of the store (see pipeline.store.base.COUNTS). ``version``: its stage's;
    ``by``: the user and the host that made it. Older records have neither."""

    stage: str
    key: str
    inputs: Mapping[str, str]
    recipe: Mapping[str, Any]
    ledger: Ledger
    blobs: Mapping[str, str] = field(default_factory=dict)
    shard_table: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    requests: Mapping[str, int] = field(default_factory=dict)
    version: int | None = None
    by: Mapping[str, str] = field(default_factory=dict)


def shard_path(stage: str, key: str) -> str:
    return f"shards/{stage}/{key}.json"


def artifact_path(stage: str, key: str) -> str:
    return f"artifacts/{stage}/{key}.json"


def publish_shard(
    store: Store,
    stage: str,
    number: int,
    key: str,
    ledger: Ledger,
    blobs: Mapping[str, bytes | Path],
    counts: Mapping[str, int],
) -> Shard:
    """Blobs first, the record last. Returns the shard that stands, which may be another worker's."""
    names = {name: put_blob(store, data) for name, data in sorted(blobs.items())}
    crash_point("shard.before_record", shard_path(stage, key))
    body = {"number": number, "key": key, "ledger": ledger.as_json(), "blobs": names, "counts": dict(counts)}
    record = create_record(store, shard_path(stage, key), body)
    crash_point("shard.after_record", shard_path(stage, key))
    return _shard(record)


def read_shard(store: Store, stage: str, key: str) -> Shard | None:
    """A finished shard, or None if it has still to be made."""
    record = read_record(store, shard_path(stage, key))
    return None if record is None else _shard(record)


def read_each_shard(store: Store, stage: str, keys: Sequence[str]) -> Iterator[Shard | None]:
    """``read_shard`` of every key, in their order: several at once, and never many in memory."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(keys), WINDOW):
            yield from pool.map(lambda key: read_shard(store, stage, key), keys[start : start + WINDOW])


def _shard(record: Mapping[str, Any]) -> Shard:
    ledger = Ledger.from_json(record["ledger"])
    return Shard(record["number"], record["key"], ledger, record["blobs"], record["counts"])


def write_table(columns: Mapping[str, Any], dictionary: bool = True, group: int | None = None) -> bytes:
    """Parquet bytes of equal-length columns (or of a pyarrow Table): equal input, equal bytes.

    Without ``dictionary``, numbers that hardly repeat are read four times as fast. A reader of batches holds ``group``
    rows at a time, by default a million.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", store_schema=False, use_dictionary=dictionary, row_group_size=group)
    return out.getvalue()


def read_table(store: Store, blob: str, columns: list[str] | None = None) -> Any:
    """A Parquet blob as a pyarrow Table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Not pq.read_table: it starts threads of Arrow's, and where they are still busy when a command ends they abort it.
    return pq.ParquetFile(pa.BufferReader(read_blob(store, blob))).read(columns=columns, use_threads=False)


class ShardTable:
    """The list of an artefact's shards while it grows: columns instead of objects, since there may be many."""

    def __init__(self) -> None:
        self._rows: list[Shard] = []
        self._parts: list[Any] = []
        self._ledger = Ledger()

    def add(self, shard: Shard) -> None:
        self._ledger += shard.ledger
        self._rows.append(shard)
        if len(self._rows) == WINDOW:
            self._pack()

    def _pack(self) -> None:
        import pyarrow as pa

        rows, self._rows = self._rows, []
        columns: dict[str, Any] = {
            "number": pa.array([s.number for s in rows], pa.int64()),
            "key": pa.array([s.key for s in rows], pa.string()),
            "kept": pa.array([s.ledger.kept for s in rows], pa.int64()),
            "rejected": pa.array([sum(s.ledger.rejected.values()) for s in rows], pa.int64()),
            "deferred": pa.array([sum(s.ledger.deferred.values()) for s in rows], pa.int64()),
        }
        for name in {name for s in rows for name in s.blobs if not name.startswith(NOTE)}:
            columns[f"blob.{name}"] = pa.array([s.blobs.get(name) for s in rows], pa.string())
        for name in {name for s in rows for name in s.counts}:
            columns[f"count.{name}"] = pa.array([s.counts.get(name, 0) for s in rows], pa.int64())
        self._parts.append(pa.table(columns))

    def write(self, store: Store) -> tuple[str, Ledger]:
        """Store it, ordered by number; return its blob and the sum of the ledgers."""
        import pyarrow as pa

        self._pack()
        table = pa.concat_tables(self._parts, promote_options="default").sort_by("number").combine_chunks()
        named = sorted(name for name in table.column_names if "." in name)  # blobs, then counts
        columns = {name: table[name] for name in ("number", "key", "kept", "rejected", "deferred", *named)}
        for name in named:
            if name.startswith("count."):
                columns[name] = columns[name].fill_null(0)
        return put_blob(store, write_table(columns, group=GROUP)), self._ledger


def write_shard_table(store: Store, shards: Iterable[Shard]) -> tuple[str, Ledger]:
    """Store the list of an artefact's shards, ordered by number; return its blob and the sum of its ledgers."""
    table = ShardTable()
    for shard in shards:
        table.add(shard)
    return table.write(store)


@dataclass(frozen=True, slots=True)
class ShardRow:
    """A shard as an artefact's table lists it, with its numbers of kept rows, and of others."""

    number: int
    key: str
    kept: int
    lost: int
    blobs: Mapping[str, str]
    counts: Mapping[str, int]


def read_shards(store: Store, artifact: Artifact) -> list[ShardRow]:
    """Returns the shards of an artefact in order of their numbers. Raises CorruptObject."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = _table(store, artifact)
    with _listing(artifact):
        table = pq.ParquetFile(pa.BufferReader(data))
        return [row for batch in table.iter_batches(WINDOW, use_threads=False) for row in _rows(batch)]


def _table(store: Store, artifact: Artifact) -> bytes:
    """An artefact's list of shards as Parquet."""
    if artifact.shard_table is None:
        raise ValueError(f"{artifact.stage} has no shards")
    return read_blob(store, artifact.shard_table)


@contextmanager
def _listing(artifact: Artifact) -> Iterator[None]:
    """Raises CorruptObject for a table that is not a list of shards, or names what no record may name: like a record,
    it may come from anybody who can write to the store."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as e:
        raise CorruptObject(blob_path(artifact.shard_table or ""), f"is not a list of shards ({e})") from None


def _rows(batch: Any) -> Iterator[ShardRow]:
    # One string a name, not one for each shard.
    blobs, counts = (
        {name: sys.intern(name.removeprefix(kind)) for name in batch.schema.names if name.startswith(kind)}
        for kind in ("blob.", "count.")
    )
    for row in batch.to_pylist():
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


class ShardList:
    """The shards of an artefact, in order of their numbers, for who needs now one and now another.

    They lie in a temporary file, so that memory hardly grows with their number: by 8 bytes for each.
    """

    def __init__(self, store: Store, artifact: Artifact):
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._artifact = artifact
        numbers = [np.zeros(0, np.int64)]
        # Arrow reads by offset from a file that has no name any more, and that nobody has to remove.
        with NamedTemporaryFile(prefix=SCRATCH) as packed, NamedTemporaryFile(prefix=SCRATCH) as file:
            packed.write(_table(store, artifact))  # to a file too: as bytes it would lie in memory beside its rows
            packed.flush()
            with _listing(artifact):
                table = pq.ParquetFile(packed.name)
                with pa.ipc.new_file(file, table.schema_arrow) as writer:
                    for batch in table.iter_batches(WINDOW, use_threads=False):
                        writer.write_batch(batch)
                        numbers.append(batch["number"].to_numpy().copy())  # a view would keep the batch
            file.flush()
            self._reader = pa.ipc.open_file(pa.OSFile(file.name))
        pa.default_memory_pool().release_unused()
        self._numbers = np.concatenate(numbers)
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> ShardRow:
        """Raises IndexError behind the end, and CorruptObject."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        with self._lock, _listing(self._artifact):
            (row,) = _rows(self._reader.get_batch(place // WINDOW).slice(place % WINDOW, 1))
        return row

    def find(self, number: int) -> ShardRow | None:
        """The shard of this number, if it is listed."""
        place = int(self._numbers.searchsorted(number))
        return self[place] if place < len(self) and self._numbers[place] == number else None

    def counts(self, name: str) -> Any:
        """This count of every shard, int64 [shards]; 0 where a shard does not have it."""
        import numpy as np

        column = f"count.{name}"
        found = np.zeros(len(self), np.int64)
        if column in self._reader.schema.names:
            for i in range(self._reader.num_record_batches):  # copied, or every batch would be kept
                batch = self._reader.get_batch(i)[column].to_numpy()
                found[i * WINDOW : i * WINDOW + len(batch)] = batch
        return found


def environment() -> dict[str, str]:
    """What the bytes of a result may depend on besides its recipe. Recorded, never hashed."""
    packages = (
        "ray",
        "torch",
        "open_clip_torch",
        "img2dataset",
        "opencv-python-headless",
        "numpy",
        "pyarrow",
        "pillow",
        "scikit-learn",
        "faiss-cpu",
    )
    return {"python": platform.python_version(), "machine": platform.machine()} | {p: version(p) for p in packages}


def publish_artifact(store: Store, artifact: Artifact, seconds: float) -> Artifact:
    """Create the record of an artefact whose blobs are in the store; return the one that stands. It has the counts of
    this store's requests until now (see Store.counted)."""
    crash_point("artifact.before_record", artifact_path(artifact.stage, artifact.key))
    body = {
        "stage": artifact.stage,
        "key": artifact.key,
        "inputs": dict(artifact.inputs),
        "recipe": dict(artifact.recipe),
        "ledger": artifact.ledger.as_json(),
        "blobs": dict(artifact.blobs),
        "shard_table": artifact.shard_table,
        "metrics": dict(artifact.metrics),
        "environment": environment() | dict(artifact.environment),
        "times": {"finished": time.time(), "seconds": seconds} | dict(artifact.times),
        "requests": store.traffic.counts(),
        "version": artifact.version,
        "by": whoami(),
    }
    record = create_record(store, artifact_path(artifact.stage, artifact.key), body)
    crash_point("artifact.after_record", artifact_path(artifact.stage, artifact.key))
    return artifact_of(record)


def load_artifact(store: Store, stage: str, key: str) -> Artifact | None:
    """A finished artefact, or None."""
    record = read_record(store, artifact_path(stage, key))
    return None if record is None else artifact_of(record)


def ancestors(store: Store, artifact: Artifact) -> Iterator[Artifact]:
    """An artefact and all that it was made from, each once, the nearest first. What is no longer there is passed over.

    At equal distance models that are pinned come after others, by their names: what is behind them may be older.
    """
    queue, seen = [artifact], {(artifact.stage, artifact.key)}
    for made in queue:
        yield made
        for inputs in sorted(made.inputs.items(), reverse=True):
            if inputs not in seen:
                seen.add(inputs)
                if (found := load_artifact(store, *inputs)) is not None:
                    queue.append(found)


def artifact_of(record: Mapping[str, Any]) -> Artifact:
    """The artefact that a record holds."""
    names = ("stage", "key", "inputs", "recipe", "blobs", "shard_table", "metrics", "environment", "times")
    values = {name: record[name] for name in names}
    later: dict[str, Any] = {name: record[name] for name in ("requests", "version", "by") if name in record}
    return Artifact(ledger=Ledger.from_json(record["ledger"]), **later, **values)
