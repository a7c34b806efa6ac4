"""Finds what a store still needs: everything that releases, pins, recent runs, running stages and lists name.

An object that cannot be read stops nobody: it stays where it is, is told, and everything that it may name counts as
needed. What is known to be garbage, such as what was made with rows that were forgotten since, goes all the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from pipeline.data.source.journal import EMPTY, ListJournal
from pipeline.data.source.journal import FOLDER as LIST
from pipeline.data.source.segments import Segment, segment_path
from pipeline.errors import CorruptObject, OtherFormat
from pipeline.evaluate.figure import DOCUMENT
from pipeline.graph.artifacts import (
    SEGMENTS,
    Artifact,
    Shard,
    StageKey,
    artifact_path,
    is_preview,
    read_shards,
    shard_path,
)
from pipeline.graph.leases import read_lease
from pipeline.graph.records import ARTIFACT_NAME, Pin, PlannedStage, RunRecord
from pipeline.release.pointer import FOLDER as RELEASES
from pipeline.release.pointer import Pointer, Releases
from pipeline.store import Store
from pipeline.store.names import is_part
from pipeline.store.parallel import ordered_map
from pipeline.store.records import R, blob_path, digest, read_plain, read_record
from pipeline.upkeep.live_set import LiveSet, mark_blobs, read_or_tell, record_kind

SILENT_S = 3 * 86_400.0  # without a sign of life of a lease's holder, after which it is dead, wherever it was
Clean = frozenset[StageKey] | None  # artefacts without forgotten rows; None where no row was forgotten


@dataclass
class _Project:
    """Counts how often a project has forgotten rows, and holds its runs, with the times of their records, by path."""

    forgettings: int = 0
    runs: dict[str, RunRecord] = field(default_factory=dict)
    modified: dict[str, float] = field(default_factory=dict)
    whole: bool = True  # all records of its runs can be read

    @property
    def clean(self) -> Clean:
        """Returns what was planned after the last forgetting. A key is a recipe: who makes it does not matter."""
        if not self.forgettings:
            return None
        later = [run.stages for run in self.runs.values() if run.forgettings >= self.forgettings]
        return frozenset((stage, asked.key) for stages in later for stage, asked in stages.items())


def find_live(store: Store, keep_s: float, now: float, project: str | None = None) -> LiveSet:
    """Returns what is needed, of all runs or of a ``project``'s, beside what pins, releases and lists name.

    Reads every artefact record, and the shard table of every artefact that is needed. A run is needed for ``keep_s``
    seconds, longer while one of its stages is being made, and in any case if it is its project's last. Runs that were
    planned before rows were forgotten are not needed, once there is a later run.

    Raises:
        OtherFormat: if there are records of runs of another format, and no others.
    """
    return _Search(store, keep_s, now, project).find()


class _Search:
    """Searches a store once; its attributes are what it has read so far."""

    def __init__(self, store: Store, keep_s: float, now: float, only: str | None):
        self.store, self.keep_s, self.now, self.only = store, keep_s, now, only
        self.live = LiveSet()
        self.pinned: set[str] = set()  # keys
        self.lost_pins = False  # a pin cannot be read
        self.projects: dict[str, _Project] = defaultdict(_Project)
        self.asked: dict[StageKey, PlannedStage] = {}  # by all runs that can be read
        self.made: list[StageKey] = []
        self.segments: set[str] = set()  # names of those that needed runs were planned with
        self.shards: set[str] = set()  # keys of those that stay, also of lists

    def find(self) -> LiveSet:
        live = self.live
        self._decisions()
        self._runs()
        for entry in self.store.list("artifacts/"):
            if path := ARTIFACT_NAME.fullmatch(entry.path):
                self.made.append((path["stage"], path["key"]))
        released = self._released()
        behind = self._behind(released)
        wanted: dict[str, set[str]] = defaultdict(set)
        begun: dict[str, set[str]] = defaultdict(set)
        trainings = set()
        for run in self._needed_runs(released):
            self.segments.update(run.segments)
            for name, asked in run.stages.items():
                wanted[name].add(asked.key)
                if name in run.wanted:
                    begun[name].add(asked.key)
                # Files that a recipe names count by content there; workers may still read their blobs.
                live.given.update(map(blob_path, re.findall(r"\b[0-9a-f]{64}\b", str(asked.recipe))))
                if asked.trajectory and asked.trunk:
                    trainings.add(_training(name, asked.recipe, asked.inputs))
                    live.prefixes |= {f"checkpoints/{asked.trajectory}/", f"checkpoints/{asked.trunk}/"}
        orphans, stages = self._orphans()
        done: dict[str, set[str]] = defaultdict(set)
        for stage, key in self.made:
            needed = key in wanted[stage] or key in self.pinned or (stage, key) in behind or stage in stages
            needed = needed or (orphans and (stage, key) not in self.asked)
            artifact = self._artifact(stage, key, needed)
            if artifact is None:
                continue
            # Milestones of a training are artefacts too, which no run names.
            milestone = _training(stage, artifact.recipe, artifact.inputs) in trainings
            if stage == "evaluation" and artifact.inputs.get("bundle") in released:
                self._mark_judgement(artifact, released[artifact.inputs["bundle"]])
            if needed or milestone:
                done[stage].add(key)
                self._mark_artifact(artifact)
        self._mark_segments()
        self._mark_unfinished({stage for stage, keys in begun.items() if keys - done[stage]})
        for prefix in sorted(live.prefixes):
            for entry in self.store.list(prefix):
                mark_blobs(self.store, entry.path, live)
        if live.unknown:
            live.disowned.update(map(blob_path, self._named_by_garbage()))
        return live

    def _read(self, path: str, kind: type[R]) -> R | None:
        return read_or_tell(self.store, path, kind, self.live)

    def _artifact(self, stage: str, key: str, needed: bool) -> Artifact | None:
        """Returns an artefact, None if it is missing or cannot be read. An unreadable one that is needed stays."""
        path = artifact_path(stage, key)
        try:
            return read_record(self.store, path, Artifact)
        except (CorruptObject, OtherFormat) as e:
            if needed:
                self.live.unreadable[path] = e
                self.live.unknown = True  # it may name any blob
        return None

    def _decisions(self) -> None:
        """Reads pins, and what is decided about lists."""
        for entry in self.store.list("locks/"):
            path = entry.path
            if not path.endswith(".json"):
                continue
            listed = path.startswith(LIST)
            project = self.projects[path.removeprefix(LIST).removesuffix(".json")] if listed else None
            try:
                if project is not None:
                    journal = read_plain(self.store, path, ListJournal) or EMPTY  # it may be deleted meanwhile
                    project.forgettings = journal.forgettings
                    self.live.paths.update(map(blob_path, journal.retries))
                elif pin := read_plain(self.store, path, Pin):
                    self.pinned.add(pin.key)
            except CorruptObject as e:
                self.live.unreadable[path] = e
                if project is not None:
                    project.forgettings = -1
                    self.live.unknown = True  # it may name any blob as rows to be tried again
                else:
                    self.lost_pins = True

    def _runs(self) -> None:
        for entry in self.store.list("runs/"):
            project = self.projects[entry.path.split("/")[1]]
            run = self._read(entry.path, RunRecord)
            if run is not None:
                project.runs[entry.path], project.modified[entry.path] = run, entry.modified
                self.asked |= {(stage, asked.key): asked for stage, asked in run.stages.items()}
            elif entry.path in self.live.unreadable:
                project.whole = False
                self.live.unknown = True  # its recipes may name files by their blobs
        if not any(project.runs for project in self.projects.values()):
            for path in (path for path in self.live.unreadable if path.startswith("runs/")):
                with suppress(CorruptObject):
                    read_record(self.store, path, RunRecord)  # OtherFormat: the whole store is of another format
        for project in self.projects.values():
            if project.forgettings < 0:  # the journal cannot be read, and runs were planned with it
                project.forgettings = max((run.forgettings for run in project.runs.values()), default=0)

    def _orphans(self) -> tuple[bool, set[str]]:
        """Returns whether artefacts and checkpoints stay that no readable run names, and stages of which all stay.

        A pin that cannot be read may name any artefact of a stage that is pinned, and a run that cannot be read any at
        all: but what other runs of its project name is kept by them.
        """
        pinned = {stage for (stage, _), asked in self.asked.items() if asked.lineage} if self.lost_pins else set()
        orphans = not all(project.whole for project in self.projects.values()) or (self.lost_pins and not pinned)
        if orphans:
            known = {owner for asked in self.asked.values() for owner in (asked.trajectory, asked.trunk)}
            folders = {entry.path.split("/")[1] for entry in self.store.list("checkpoints/")}
            self.live.prefixes |= {f"checkpoints/{owner}/" for owner in folders - known}
        return orphans, pinned

    def _released(self) -> dict[str, Clean]:
        """Returns for each bundle that is a release, or can be again by rollbacks, what is clean for all its projects.

        A pointer that cannot be read may name any bundle.
        """
        found: dict[str, Clean] = {}

        def add(bundle: str, clean: Clean) -> None:
            other = found.get(bundle)
            found[bundle] = clean if other is None else other if clean is None else other & clean

        for entry in self.store.list(RELEASES):
            name = entry.path.removeprefix(RELEASES).removesuffix(".json")
            pointer = self._read(entry.path, Pointer)
            if pointer is not None:
                for move in Releases(None, pointer.moves).active:
                    add(move.bundle, self.projects[name].clean)
            elif entry.path in self.live.unreadable and is_part(name):
                for stage, key in self.made:
                    if stage == "bundle":
                        add(key, self.projects[name].clean)
                        for project in self.projects.values():
                            if any(_asks(run, stage, key) for run in project.runs.values()):
                                add(key, project.clean)
        return found

    def _behind(self, released: Mapping[str, Clean]) -> set[StageKey]:
        """Returns stage and key of all that released bundles were made from.

        Models are kept. Of data from before a forgetting only the records are kept, which say what a bundle came from,
        without the blobs that they list, and models of then lose their previews: forgotten rows must go.
        """
        found = set()
        for key, clean in released.items():
            for name, artifact in self._ancestors(("bundle", key)):
                if clean is None or name in clean:
                    found.add(name)
                    continue
                self.live.paths.add(artifact_path(*name))
                if artifact is not None and artifact.shard_table is None:
                    kept = (blob for file, blob in artifact.blobs.items() if not is_preview(file))
                    self.live.paths.update(map(blob_path, kept))
        return found

    def _ancestors(self, name: StageKey) -> Iterator[tuple[StageKey, Artifact | None]]:
        """Yields an artefact and all behind it that is there. What one that cannot be read was made from, runs say."""
        queue, seen = [name], {name}
        for each in queue:
            artifact = self._artifact(*each, needed=True)
            if artifact is None and artifact_path(*each) not in self.live.unreadable:
                continue
            yield each, artifact
            inputs = artifact.inputs if artifact else self.asked[each].inputs if each in self.asked else {}
            queue += [one for one in inputs.items() if one not in seen]
            seen |= set(inputs.items())

    def _mark_judgement(self, evaluation: Artifact, clean: Clean) -> None:
        """Marks an evaluation of a released bundle, which gates compare with; its images go with forgotten rows."""
        self.live.paths.add(artifact_path(evaluation.stage, evaluation.key))
        inputs = {name: key for name, key in evaluation.inputs.items() if name != "bundle"}
        kept = clean is None or inputs.items() <= clean
        named = (blob for name, blob in evaluation.blobs.items() if kept or name == DOCUMENT)
        self.live.paths.update(map(blob_path, named))

    def _needed_runs(self, released: Mapping[str, Clean]) -> list[RunRecord]:
        """Returns needed runs: where one of a project cannot be read, all others since the last forgetting.

        Records of runs that made a released bundle stay too, which say what of it is clean.
        """
        held = set(self._held())
        self.live.paths.update(path for path in held if path.count("/") > 1)  # of checkpoints, which no run names
        needed = []
        for name, project in self.projects.items():
            if self.only not in (None, name):
                continue
            # No run can be planned with a forgetting that is still to come.
            counted = {path: min(run.forgettings, project.forgettings) for path, run in project.runs.items()}
            last = max(project.runs, key=lambda path: (counted[path], path), default=None)
            for path, run in project.runs.items():
                if (bundle := run.stages.get("bundle")) and bundle.key in released:
                    self.live.paths.add(path)
                being_made = any(f"leases/{asked.key}.json" in held for asked in run.stages.values())
                recent = self.now - project.modified[path] < self.keep_s or not project.whole
                if path == last or being_made or (recent and counted[path] == project.forgettings):
                    self.live.paths.update([path] if run.package is None else [path, run.package])
                    self.live.paths.update(f"leases/{asked.key}.json" for asked in run.stages.values())
                    needed.append(run)
        return needed

    def _held(self) -> Iterator[str]:
        """Yields the paths of leases whose holders, as the store's clock says, gave a sign of life lately."""
        for entry in self.store.list("leases/"):
            if self.now - entry.modified >= SILENT_S:
                continue
            try:
                if read_lease(self.store, entry.path) is not None:
                    yield entry.path
            except CorruptObject as e:
                self.live.unreadable[entry.path] = e
                yield entry.path

    def _mark_artifact(self, artifact: Artifact) -> None:
        paths = self.live.paths
        paths.add(artifact_path(artifact.stage, artifact.key))
        paths.update(map(blob_path, artifact.named))
        if artifact.shard_table is None:
            return
        try:
            shards = read_shards(self.store, artifact)
        except CorruptObject as e:
            if self.store.stat(e.path):
                self.live.unreadable[e.path] = e
            return
        self.shards.update(shard.key for shard in shards)
        paths.update(blob_path(blob) for shard in shards for blob in shard.blobs.values())
        if artifact.inputs:  # the shards of a source have no records
            records = [shard_path(artifact.stage, shard.key) for shard in shards]
            paths.update(records)
            for _ in ordered_map(lambda path: mark_blobs(self.store, path, self.live), records):
                pass  # records name notes too, which the table does not

    def _mark_segments(self) -> None:
        """Marks the segments of the lists that needed runs were planned with, and what they name."""
        for path in map(segment_path, sorted(self.segments)):
            if segment := self._read(path, Segment):
                self.live.paths.add(path)
                self.live.paths.update(map(blob_path, segment.named))
                self.shards.update(key for each in segment.shards for key in (each.image_key, each.caption_key))

    def _mark_unfinished(self, stages: set[str]) -> None:
        """Marks the shards of stages that are under way or were interrupted: the next run need not make them again.

        Shards made from others that are garbage are garbage too, such as those with rows that were forgotten since.
        """
        if not stages:
            return
        paths = [entry.path for entry in self.store.list("shards/") if not entry.path.startswith(SEGMENTS)]
        there = {path.rpartition("/")[2].removesuffix(".json") for path in paths}
        known = {stage for stage, _ in self.asked}
        paths = [path for path in paths if path.split("/")[1] in stages]
        read = ordered_map(lambda path: self._read(path, Shard), paths)
        found = {path: shard for path, shard in zip(paths, read, strict=True) if shard}
        keys = {shard.key for shard in found.values()}
        users: dict[str, list[str]] = defaultdict(list)
        garbage: set[str] = set()
        for shard in found.values():
            for name, source in shard.inputs.items():
                users[source].append(shard.key)
                # Inputs of other names are not shards but numbers, or tables of a pass.
                if source not in keys and (source in there or name.partition(" ")[0] in known):
                    garbage.add(source)
        garbage -= self.shards
        queue = list(garbage)
        for source in queue:
            new = {key for key in users[source] if key not in self.shards} - garbage
            garbage |= new
            queue += new
        for path, shard in found.items():
            if shard.key not in garbage:
                self.live.paths.add(path)
                self.live.paths.update(map(blob_path, shard.named))

    def _named_by_garbage(self) -> Iterator[str]:
        """Yields the blobs that artefacts, shards and segments name which are garbage themselves."""
        seen = LiveSet()  # an object that cannot be read names nothing here
        for stage, key in self.made:
            path = artifact_path(stage, key)
            if path not in self.live and (artifact := read_or_tell(self.store, path, Artifact, seen)):
                yield from artifact.named
        for entry in self.store.list("shards/"):
            if entry.path not in self.live and (
                record := read_or_tell(self.store, entry.path, record_kind(entry.path), seen)
            ):
                yield from record.named


def _asks(run: RunRecord, stage: str, key: str) -> bool:
    return stage in run.stages and run.stages[stage].key == key


def _training(stage: str, recipe: Mapping[str, object], inputs: Mapping[str, str]) -> str:
    """Returns a digest that is equal for all lengths of one training, and for its branches."""
    return digest([stage, {k: v for k, v in recipe.items() if k not in ("samples", "decay")}, sorted(inputs.items())])
