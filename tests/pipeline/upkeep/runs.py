"""Runs of a made-up project in a store, of any age, with what they make, forget and release; and collections of it."""

import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from pipeline.data.source.journal import change_journal, with_forgotten
from pipeline.graph.artifacts import (
    Artifact,
    load_artifact,
    publish_artifact,
    publish_shard,
    read_shards,
    write_shard_table,
)
from pipeline.graph.keys import flatten, trajectory
from pipeline.graph.plan import plan
from pipeline.graph.runs import record_run, run_entries
from pipeline.graph.stages import Graph, Stage
from pipeline.ledger import Ledger
from pipeline.release.pointer import Move, Releases, move_release, read_releases
from pipeline.store import Store
from pipeline.store.base import Entry
from pipeline.store.records import blob_path, create_record, put_blob, read_blob
from pipeline.training.recipes import ClipRecipe
from pipeline.training.records import CheckpointRecord, SavedJournal
from pipeline.upkeep.collect import TOMBSTONES, Collection, collect

DAY = 86_400.0
NOW = time.time()
AGES: dict[tuple[str, str], float] = {}  # of runs, by store and path


def never(_: object) -> Artifact:
    raise AssertionError


def two_stages(seed: int = 0) -> Graph:
    recipe = ClipRecipe(samples=64, batch=8, lanes=8, seed=seed)
    stages = (Stage("pairs", 1, recipe, (), never), Stage("clip", 1, recipe, ("pairs",), never, "training"))
    return {stage.name: stage for stage in stages}


def run(
    store: Store, seed: int = 0, made: tuple[str, ...] = ("pairs", "clip"), age_s: float = 0.0, forgettings: int = 0
) -> dict[str, str]:
    """A run that made some of its stages: pairs has two shards, clip a model and a checkpoint. Keys by stage.

    ``age_s``: how long ago it began, by the store's clock. ``forgettings``: of the journal of its plan.
    """
    graph = two_stages(seed)
    verdicts = plan(graph, {}, "p", store, {})
    record_run(store, "p", graph, verdicts, forgettings=forgettings)
    AGES[store.url, run_entries(store, "p")[-1].path] = age_s
    keys = {verdict.stage: verdict.key for verdict in verdicts}
    shards = [
        publish_shard(store, "pairs", n, f"{seed}-{n}", Ledger(kept=1), {"index": f"{seed} {n}".encode()}, {})
        for n in range(2)
    ]
    if "pairs" in made:
        table, ledger = write_shard_table(store, shards)
        publish_artifact(store, Artifact("pairs", keys["pairs"], {"source": "s"}, {}, ledger, shard_table=table), 1.0)
    folder = trajectory("clip", graph["clip"].version, graph["clip"].recipe, {"pairs": keys["pairs"]})
    blob = put_blob(store, f"state {seed}".encode())
    journal = SavedJournal([{"samples": 64, "preview": put_blob(store, f"preview {seed}".encode())}])
    saved = CheckpointRecord(64, 1, 1.0, {}, journal, {"model": blob})
    create_record(store, f"checkpoints/{folder}/{64:012d}-0001.json", saved)
    if "clip" in made:
        publish_clip(store, seed, keys, 64)
    return keys


def publish_clip(store: Store, seed: int, keys: dict[str, str], samples: int, key: str = "") -> None:
    recipe = flatten(two_stages(seed)["clip"].recipe) | {"samples": samples}
    blobs = {"model": put_blob(store, f"model {seed} {samples}".encode())}
    blobs["preview.png"] = put_blob(store, f"preview {seed}".encode())
    inputs = {"pairs": keys["pairs"]}
    publish_artifact(store, Artifact("clip", key or keys["clip"], inputs, recipe, Ledger(), blobs), 1.0)


def forget(store: Store, project: str) -> None:
    change_journal(store, project, lambda j: with_forgotten(j, [f"mark {j.forgettings}"]))


def release(
    store: Store, keys: dict[str, str], action: Literal["promote", "rollback"] = "promote", project: str = "released"
) -> set[str]:
    """Make a bundle of a run's clip, with an evaluation, the release; return the names of the evaluation's blobs."""
    bundle = Artifact("bundle", f"bundle-{keys['clip']}", {"clip": keys["clip"]}, {}, Ledger())
    publish_artifact(store, bundle, 1.0)
    blobs = {name: put_blob(store, f"{name} {keys}".encode()) for name in ("evaluation.json", "nearest.png")}
    inputs = {"bundle": bundle.key, "pairs": keys["pairs"]}
    publish_artifact(store, Artifact("evaluation", f"e-{bundle.key}", inputs, {}, Ledger(), blobs), 1.0)
    move = Move(action, bundle.key, f"e-{bundle.key}", NOW)
    move_release(store, project, read_releases(store, project), move)
    return set(map(blob_path, blobs.values()))


def there(store: Store, keys: dict[str, str], stage: str = "pairs") -> bool:
    """Whether what a run made of this stage is there."""
    return load_artifact(store, stage, keys[stage]) is not None


def model(store: Store, keys: dict[str, str]) -> bytes:
    """What clip has made."""
    clip: Any = load_artifact(store, "clip", keys["clip"])
    return read_blob(store, clip.blobs["model"])


def rows(store: Store, keys: dict[str, str]) -> dict[str, str]:
    """The blobs of all shards of pairs, and the paths where they lie."""
    pairs: Any = load_artifact(store, "pairs", keys["pairs"])
    return {blob: blob_path(blob) for shard in read_shards(store, pairs) for blob in shard.blobs.values()}


def indices(store: Store, keys: dict[str, str]) -> list[bytes]:
    """What the shards of pairs hold."""
    return [read_blob(store, blob) for blob in rows(store, keys)]


def paths(store: Store) -> set[str]:
    return {entry.path for entry in store.list("")} - {TOMBSTONES}


def look(store: Store, now: float = NOW, delete: bool = True) -> Collection:
    """A collection that keeps what runs of 30 days need, with a day's grace."""
    return collect(store, 30 * DAY, DAY, now, delete)


def sweep(store: Store, now: float = NOW) -> Collection:
    """Finds, and deletes a day later, without anybody at work between."""
    look(store, now)
    return look(store, now + DAY)


def lift_when_listed(monkeypatch: pytest.MonkeyPatch, store: Store, *prefixes: str) -> None:
    """Deletes what is listed with one of the prefixes, after it is listed, as another process may."""
    original = type(store).list

    def list_and_delete(self: Store, prefix: str) -> Iterator[Entry]:
        entries = list(original(self, prefix))
        self.delete([entry.path for entry in entries if prefix in prefixes])
        return iter(entries)

    monkeypatch.setattr(type(store), "list", list_and_delete)


def publish_model(store: Store, stage: str, **inputs: str) -> Artifact:
    blobs = {"model.safetensors": put_blob(store, f"weights of {stage} {inputs}".encode())}
    return publish_artifact(store, Artifact(stage, f"{stage}-key", inputs, {}, Ledger(), blobs), 1.0)


def released(store: Store) -> dict[str, Artifact]:
    """A bundle of a model, which is the release, with the data that the model was trained on."""
    shard = put_blob(store, b"pictures")
    table, ledger = write_shard_table(store, [])
    pairs = publish_artifact(store, Artifact("pairs", "pairs-key", {}, {}, ledger, {"a": shard}, table), 1.0)
    decoder = publish_model(store, "decoder", pairs="pairs-key")
    blobs = {"decoder/model.safetensors": decoder.blobs["model.safetensors"], "README.md": put_blob(store, b"card")}
    inputs = {"decoder": "decoder-key"}
    bundle = publish_artifact(store, Artifact("bundle", "bundle-key", inputs, {}, Ledger(), blobs), 1.0)
    evaluation = publish_model(store, "evaluation", bundle="bundle-key")
    move_release(store, "p", Releases(), Move("promote", "bundle-key", "evaluation-key", NOW))
    return {"pairs": pairs, "decoder": decoder, "bundle": bundle, "evaluation": evaluation}
