"""What a store still needs: everything that releases, pins, recent runs, running stages and lists name."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.artifacts import Artifact, ancestors, artifact_path, load_artifact, read_shards, shard_path
from pipeline.data.journal import read_journal
from pipeline.errors import CorruptObject
from pipeline.graph import SOURCES
from pipeline.history import asked_at
from pipeline.leases import is_held
from pipeline.records import blob_path, digest, read_record
from pipeline.release import read_releases, released_projects
from pipeline.store import Store

THREADS = 16  # records are small, and each is a request


@dataclass
class Live:
    """Paths that stay, and prefixes under which everything stays because a stage is not finished."""

    paths: set[str] = field(default_factory=set)
    prefixes: set[str] = field(default_factory=set)

    def __contains__(self, path: str) -> bool:
        return path in self.paths or path.startswith(tuple(self.prefixes))


def find_live(store: Store, keep_s: float, now: float) -> Live:
    """Mark what is needed. Reads every artefact record, and the shard table of every artefact that is needed.

    A run is needed for ``keep_s`` seconds, longer while one of its stages is being made, and in any case if it is its
    project's last. Runs of before something was forgotten are not, once there is a later one. Raises UserError if the
    pointer of a release is damaged.
    """
    live = Live()
    pinned = _pinned(store, live)
    released = _released(store)
    behind = _behind(store, released, live)
    runs = _needed_runs(store, keep_s, now, live)
    wanted: dict[str, set[str]] = defaultdict(set)
    trainings = set()
    for stages in runs:
        for name, asked in stages.items():
            wanted[name].add(asked["key"])
            # Files that a recipe names count by content there; workers may still read their blobs.
            live.paths.update(blob_path(v) for v in asked["recipe"].values() if re.fullmatch(r"[0-9a-f]{64}", str(v)))
            if "trajectory" in asked:
                trainings.add(_training(name, asked["recipe"], asked["inputs"]))
                live.prefixes.add(f"checkpoints/{asked['trajectory']}/")
                live.prefixes.add(f"checkpoints/{asked.get('trunk', asked['trajectory'])}/")
    made: dict[str, set[str]] = defaultdict(set)
    for entry in store.list("artifacts/"):
        _, stage, file = entry.path.split("/")
        key = file.removesuffix(".json")
        artifact = load_artifact(store, stage, key)
        if artifact is None:
            continue
        # Milestones of a training are artefacts too, which no run names.
        milestone = _training(stage, artifact.recipe, artifact.inputs) in trainings
        if stage == "evaluation" and artifact.inputs.get("bundle") in released:
            _mark_judgement(artifact, released[artifact.inputs["bundle"]], live)
        if key in wanted[stage] or key in pinned or milestone or (stage, key) in behind:
            made[stage].add(key)
            _mark_artifact(store, artifact, live)
    for stage, keys in wanted.items():
        if keys - made[stage]:  # under way, or interrupted: its finished shards are needed too
            live.prefixes.add(f"shards/{stage}/")
    _mark_segments(store, live)
    _mark_named(store, live)
    return live


def _pinned(store: Store, live: Live) -> set[str]:
    keys = set()
    for entry in store.list("locks/"):
        name = entry.path.removeprefix("locks/")
        if name.startswith("list-"):
            journal = read_journal(store, name.removeprefix("list-").removesuffix(".json"))
            live.paths.update(blob_path(blob) for blob in journal.retries)
        elif name.endswith(".json"):
            keys.add(json.loads(store.read(entry.path))["key"])
    return keys


def _released(store: Store) -> dict[str, float]:
    """For every bundle that is a release, or can be again by rollbacks, when its project last forgot something."""
    found: dict[str, float] = defaultdict(float)
    for project in released_projects(store):
        forgotten_at = read_journal(store, project).forgotten_at
        for move in read_releases(store, project).standing:
            found[move.bundle] = max(found[move.bundle], forgotten_at)
    return found


def _behind(store: Store, released: Mapping[str, float], live: Live) -> set[tuple[str, str]]:
    """Stage and key of all that released bundles were made from.

    Models stand. Of the data of before something was forgotten only the records stay, which say what a bundle came
    from, without what they list: what was forgotten must go.
    """
    found = set()
    for key, forgotten_at in released.items():
        bundle = load_artifact(store, "bundle", key)
        for artifact in ancestors(store, bundle) if bundle is not None else ():
            if artifact.shard_table is None or _began(artifact) > forgotten_at:
                found.add((artifact.stage, artifact.key))
            else:
                live.paths.add(artifact_path(artifact.stage, artifact.key))
    return found


def _mark_judgement(evaluation: Artifact, forgotten_at: float, live: Live) -> None:
    """An evaluation of a released bundle, which gates compare with; its pictures go with what was forgotten."""
    live.paths.add(artifact_path(evaluation.stage, evaluation.key))
    kept = {name for name in evaluation.blobs if name == "evaluation.json" or _began(evaluation) > forgotten_at}
    live.paths.update(blob_path(evaluation.blobs[name]) for name in kept)


def _began(artifact: Artifact) -> float:
    """Seconds since the epoch."""
    return artifact.times["finished"] - artifact.times["seconds"]


def _needed_runs(store: Store, keep_s: float, now: float, live: Live) -> list[Mapping[str, Any]]:
    """What the needed runs asked for."""
    by_project: dict[str, list[str]] = defaultdict(list)
    for entry in store.list("runs/"):
        by_project[entry.path.split("/")[1]].append(entry.path)
    held = {entry.path for entry in store.list("leases/") if is_held(store, entry.path)}
    runs = []
    for project, paths in by_project.items():
        forgotten_at = read_journal(store, project).forgotten_at
        last = max(paths)
        for path in paths:
            record = read_record(store, path)
            if record is None:
                continue
            being_made = any(f"leases/{asked['key']}.json" in held for asked in record["stages"].values())
            began = asked_at(path)
            if path == last or being_made or (now - began < keep_s and began > forgotten_at):
                live.paths.add(path)
                live.paths.update([record["package"]] if "package" in record else [])
                live.paths.update(f"leases/{asked['key']}.json" for asked in record["stages"].values())
                runs.append(record["stages"])
    return runs


def _training(stage: str, recipe: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Equal for all lengths of one training, and for its branches."""
    return digest([stage, {k: v for k, v in recipe.items() if k not in ("samples", "decay")}, sorted(inputs.items())])


def _mark_artifact(store: Store, artifact: Artifact, live: Live) -> None:
    live.paths.add(artifact_path(artifact.stage, artifact.key))
    live.paths.update(map(blob_path, artifact.blobs.values()))
    if artifact.shard_table is not None:
        live.paths.add(blob_path(artifact.shard_table))
        try:
            shards = read_shards(store, artifact)
            live.paths.update(blob_path(blob) for shard in shards for blob in shard.blobs.values())
            if artifact.stage not in SOURCES:  # whose shards have no records
                records = [shard_path(artifact.stage, shard.key) for shard in shards]
                live.paths.update(records)
                with ThreadPoolExecutor(THREADS) as pool:  # they name notes too, which the table does not
                    list(pool.map(lambda path: mark_blobs(store, path, live), records))
        except CorruptObject:  # the next run makes it again
            pass


def _mark_segments(store: Store, live: Live) -> None:
    """The record of a segment stays while all its tables do; while a source is being made, with all its tables. So do
    the hashes of its references."""
    for entry in store.list("shards/source/segment-"):
        record = read_record(store, entry.path)
        if record is None:
            continue
        tables = {blob_path(shard[name]) for shard in record["shards"] for name in ("refs", "captions")}
        if "shards/source/" in live.prefixes or tables <= live.paths:
            live.paths.add(entry.path)
            live.paths |= tables
            live.paths.update(map(blob_path, record.get("hashes", ())))


def _mark_named(store: Store, live: Live) -> None:
    """The blobs of every record under the prefixes that stay."""
    for prefix in sorted(live.prefixes):
        for entry in store.list(prefix):
            mark_blobs(store, entry.path, live)


def mark_blobs(store: Store, path: str, live: Live) -> None:
    """Let the blobs stay that the record of a shard or checkpoint names."""
    record = None if "/attempts/" in path or "/segment-" in path else read_record(store, path)
    if record is not None:
        live.paths.update(map(blob_path, record["blobs"].values()))
