"""Artefacts and shards: what a stage leaves in the store, and how to read it back."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.graph.damage import create_record, read_record
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.crash import crash_point
from pipeline.store.records import put_blob, whoami

StageKey = tuple[str, str]  # a stage and a key
NOTE = "note."  # begins the names of blobs that a shard's record names and an artefact's table does not
SEGMENTS = "shards/source/segment-"  # begins the paths of records of a list's segments


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of an artefact.

    Blobs called ``note.`` are beside the result, such as times: they may differ when a shard is made again. ``counts``
    are sums that later stages need without opening a blob.
    """

    number: int
    key: str
    ledger: Ledger
    blobs: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """An immutable result.

    ``blobs`` maps file names to sha256; ``shard_table`` is the blob that lists its shards. ``version`` is that of its
    stage, and ``by`` the user and the host that made it; older records have neither.
    """

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
    version: int | None = None
    by: Mapping[str, str] = field(default_factory=dict)


def shard_path(stage: str, key: str) -> str:
    """Returns the path of a shard's record."""
    return f"shards/{stage}/{key}.json"


def artifact_path(stage: str, key: str) -> str:
    """Returns the path of an artefact's record."""
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
    """Returns a finished shard, or None if it has still to be made."""
    record = read_record(store, shard_path(stage, key))
    return None if record is None else _shard(record)


def _shard(record: Mapping[str, Any]) -> Shard:
    ledger = Ledger.from_json(record["ledger"])
    return Shard(record["number"], record["key"], ledger, record["blobs"], record["counts"])


def environment() -> dict[str, str]:
    """Returns what the bytes of a result may depend on besides its recipe. Recorded, never hashed."""
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
    """Creates the record of an artefact whose blobs are in the store. Returns the one that stands."""
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
        "version": artifact.version,
        "by": whoami(),
    }
    record = create_record(store, artifact_path(artifact.stage, artifact.key), body)
    crash_point("artifact.after_record", artifact_path(artifact.stage, artifact.key))
    return artifact_of(record)


def load_artifact(store: Store, stage: str, key: str) -> Artifact | None:
    """Returns a finished artefact, or None."""
    record = read_record(store, artifact_path(stage, key))
    return None if record is None else artifact_of(record)


def ancestors(store: Store, artifact: Artifact) -> Iterator[Artifact]:
    """Yields an artefact and all that it was made from, each once, the nearest first, and skips what was deleted.

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
    """Returns the artefact that a record holds."""
    names = ("stage", "key", "inputs", "recipe", "blobs", "shard_table", "metrics", "environment", "times")
    values = {name: record[name] for name in names}
    later: dict[str, Any] = {name: record[name] for name in ("version", "by") if name in record}
    return Artifact(ledger=Ledger.from_json(record["ledger"]), **later, **values)
