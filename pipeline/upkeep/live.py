"""Finds what a store still needs: everything that releases, pins, recent runs, running stages and lists name."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.source.journal import read_journal
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import (
    SEGMENTS,
    Artifact,
    StageKey,
    ancestors,
    artifact_path,
    is_preview,
    load_artifact,
    read_shards,
    shard_path,
)
from pipeline.graph.damage import pinned_key, read_record
from pipeline.graph.pointer import read_releases, released_projects
from pipeline.graph.runs import asked_at
from pipeline.store import Store
from pipeline.store.leases import read_lease
from pipeline.store.parallel import ordered_map
from pipeline.store.records import blob_path, digest, open_record

log = logging.getLogger("unclip")
SILENT_S = 3 * 86_400.0  # without a sign of life of a lease's holder, after which it is dead, wherever it was
Clean = frozenset[StageKey] | None  # artefacts without forgotten rows; None where no row was forgotten


@dataclass
class Live:
    """Holds paths that stay, and prefixes under which everything stays because a stage is not finished."""

    paths: set[str] = field(default_factory=set)
    prefixes: set[str] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)  # checkpoints, of whose blobs nothing is known

    def __contains__(self, path: str) -> bool:
        unknown = bool(self.unreadable) and path.startswith("blobs/")
        return unknown or path in self.paths or path.startswith(tuple(self.prefixes))


@dataclass(frozen=True)
class _Project:
    """Counts how often a project has forgotten rows, and holds the records of its runs by path."""

    forgettings: int
    runs: dict[str, Mapping[str, Any]]

    @property
    def clean(self) -> Clean:
        """Returns what was planned after the last forgetting. A key is a recipe: who makes it does not matter."""
        if not self.forgettings:
            return None
        later = [run["stages"] for run in self.runs.values() if run["forgettings"] >= self.forgettings]
        return frozenset((stage, asked["key"]) for stages in later for stage, asked in stages.items())


def find_live(store: Store, keep_s: float, now: float) -> Live:
    """Returns what is needed. Reads every artefact record, and the shard table of every artefact that is needed.

    A run is needed for ``keep_s`` seconds, longer while one of its stages is being made, and in any case if it is its
    project's last. Runs that were planned before rows were forgotten are not needed, once there is a later run. Raises
    UserError if the pointer of a release is damaged.
    """
    live = Live()
    pinned = _pinned(store, live)
    projects = _projects(store)
    released = _released(store, projects)
    behind = _behind(store, released, live)
    runs = _needed_runs(store, projects, released, keep_s, now, live)
    wanted: dict[str, set[str]] = defaultdict(set)
    trainings = set()
    begun: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for name, asked in run["stages"].items():
            wanted[name].add(asked["key"])
            if name in run.get("wanted", run["stages"]):
                begun[name].add(asked["key"])
            # Files that a recipe names count by content there; workers may still read their blobs.
            live.paths.update(map(blob_path, re.findall(r"\b[0-9a-f]{64}\b", str(asked["recipe"]))))
            if "trajectory" in asked:
                trainings.add(_training(name, asked["recipe"], asked["inputs"]))
                live.prefixes.add(f"checkpoints/{asked['trajectory']}/")
                live.prefixes.add(f"checkpoints/{asked['trunk']}/")
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
    for stage, keys in begun.items():
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
            with suppress(FileNotFoundError):  # the pin is lifted meanwhile
                keys.add(pinned_key(store, entry.path))
    return keys


def _projects(store: Store) -> dict[str, _Project]:
    """Returns every project that has runs, or a release."""
    found: dict[str, _Project] = {}
    for project in released_projects(store):
        found[project] = _Project(read_journal(store, project).forgettings, {})
    for entry in store.list("runs/"):
        project = entry.path.split("/")[1]
        if project not in found:
            found[project] = _Project(read_journal(store, project).forgettings, {})
        record = read_record(store, entry.path)
        if record is not None:
            found[project].runs[entry.path] = record
    return found


def _released(store: Store, projects: Mapping[str, _Project]) -> dict[str, Clean]:
    """Returns for every bundle that is a release, or can be again by rollbacks, what is clean for all its projects."""
    found: dict[str, Clean] = {}
    for project in released_projects(store):
        clean = projects[project].clean
        for move in read_releases(store, project).standing:
            other = found.get(move.bundle)
            found[move.bundle] = clean if other is None else other if clean is None else other & clean
    return found


def _behind(store: Store, released: Mapping[str, Clean], live: Live) -> set[StageKey]:
    """Returns stage and key of all that released bundles were made from.

    Models are kept. Of data from before a forgetting only the records are kept, which say what a bundle came from,
    without the blobs that they list, and models of then lose their previews: forgotten rows must go.
    """
    found = set()
    for key, clean in released.items():
        bundle = load_artifact(store, "bundle", key)
        for artifact in ancestors(store, bundle) if bundle is not None else ():
            name = (artifact.stage, artifact.key)
            if clean is None or name in clean:
                found.add(name)
                continue
            live.paths.add(artifact_path(*name))
            if artifact.shard_table is None:
                live.paths.update(blob_path(blob) for file, blob in artifact.blobs.items() if not is_preview(file))
    return found


def _mark_judgement(evaluation: Artifact, clean: Clean, live: Live) -> None:
    """Marks an evaluation of a released bundle, which gates compare with; its images go with forgotten rows."""
    live.paths.add(artifact_path(evaluation.stage, evaluation.key))
    inputs = {name: key for name, key in evaluation.inputs.items() if name != "bundle"}
    kept = clean is None or inputs.items() <= clean
    live.paths.update(blob_path(blob) for name, blob in evaluation.blobs.items() if kept or name == "evaluation.json")


def _needed_runs(
    store: Store,
    projects: Mapping[str, _Project],
    released: Mapping[str, Clean],
    keep_s: float,
    now: float,
    live: Live,
) -> list[Mapping[str, Any]]:
    """Returns the records of needed runs.

    Records of runs that made a released bundle stay too, which say what of it is clean.
    """
    leases = {entry.path: read_lease(store, entry.path) for entry in store.list("leases/")}
    held = {path for path, lease in leases.items() if lease is not None and now - _heard(lease) < SILENT_S}
    live.paths.update(path for path in held if path.count("/") > 1)  # of checkpoints, which no run names
    runs = []
    for project in projects.values():
        last = max(project.runs, key=lambda path: (project.runs[path]["forgettings"], path), default=None)
        for path, record in project.runs.items():
            stages = record["stages"]
            if stages.get("bundle", {}).get("key") in released:
                live.paths.add(path)
            being_made = any(f"leases/{asked['key']}.json" in held for asked in stages.values())
            recent = now - asked_at(path) < keep_s and record["forgettings"] >= project.forgettings
            if path == last or being_made or recent:
                live.paths.add(path)
                live.paths.update([record["package"]] if "package" in record else [])
                live.paths.update(f"leases/{asked['key']}.json" for asked in stages.values())
                runs.append(record)
    return runs


def _heard(lease: Mapping[str, Any]) -> float:
    """Returns when the holder of a lease gave its last sign of life; 0 where a damaged one does not say."""
    told = (lease.get("at"), lease.get("since"))
    return max((at for at in told if isinstance(at, float | int)), default=0.0)


def _training(stage: str, recipe: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Returns a digest that is equal for all lengths of one training, and for its branches."""
    return digest([stage, {k: v for k, v in recipe.items() if k not in ("samples", "decay")}, sorted(inputs.items())])


def _mark_artifact(store: Store, artifact: Artifact, live: Live) -> None:
    live.paths.add(artifact_path(artifact.stage, artifact.key))
    live.paths.update(map(blob_path, artifact.blobs.values()))
    if artifact.shard_table is not None:
        live.paths.add(blob_path(artifact.shard_table))
        try:
            shards = read_shards(store, artifact)
            live.paths.update(blob_path(blob) for shard in shards for blob in shard.blobs.values())
            if artifact.inputs:  # the shards of a source have no records
                records = [shard_path(artifact.stage, shard.key) for shard in shards]
                live.paths.update(records)
                for _ in ordered_map(lambda path: mark_blobs(store, path, live), records):
                    pass  # records name notes too, which the table does not
        except CorruptObject:  # the next run makes it again
            pass


def _mark_segments(store: Store, live: Live) -> None:
    """Marks segments of lists whose tables all stay, with the hashes of their references.

    While a source is being made, it marks every segment and its tables.
    """
    for entry in store.list(SEGMENTS):
        record = read_record(store, entry.path)
        if record is None:
            continue
        if "shards/source/" in live.prefixes or {blob_path(table) for table in _tables(record)} <= live.paths:
            live.paths.add(entry.path)
            _mark_segment(record, live)


def _tables(segment: Mapping[str, Any]) -> list[str]:
    return [shard[name] for shard in segment["shards"] for name in ("refs", "captions")]


def _mark_segment(segment: Mapping[str, Any], live: Live) -> None:
    live.paths.update(map(blob_path, (*_tables(segment), *segment["hashes"])))


def _mark_named(store: Store, live: Live) -> None:
    """Marks the blobs of every record under the prefixes that stay."""
    for prefix in sorted(live.prefixes):
        for entry in store.list(prefix):
            mark_blobs(store, entry.path, live)


def mark_blobs(store: Store, path: str, live: Live) -> None:
    """Marks the blobs that the record of a shard, a checkpoint or a segment of the list names."""
    if "/attempts/" in path:
        return
    try:
        record = (open_record if path.startswith("checkpoints/") else read_record)(store, path)
    except CorruptObject as e:  # it stays where it is: another machine may be able to read it
        live.unreadable.add(path)
        log.warning("%s; no blob is collected as long as it is there, since it may name any of them", e)
        return
    if record is None:
        return
    if path.startswith(SEGMENTS):
        _mark_segment(record, live)
    else:
        live.paths.update(map(blob_path, record["blobs"].values()))
        lines = record.get("journal", {}).get("lines", ())  # of a checkpoint
        live.paths.update(blob_path(line["preview"]) for line in lines if "preview" in line)
