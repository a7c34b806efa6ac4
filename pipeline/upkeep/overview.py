"""Overview of a store for people: runs, running stages, artefacts. Its cost does not grow with the number of rows.

Listings tell what is made; of runs, leases and artefacts only the records that are shown are read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import Artifact, StageKey, artifact_path
from pipeline.graph.leases import Holder, lease_path, read_lease
from pipeline.graph.plan import read_pin
from pipeline.graph.records import ARTIFACT_NAME, RUN_NAME, PlannedStage, RunRecord
from pipeline.graph.runs import run_entries
from pipeline.release.pointer import Move, read_releases, released_projects
from pipeline.store import Store
from pipeline.store.base import Entry
from pipeline.store.parallel import ordered_map
from pipeline.store.records import peek_record

SHOWN_RUNS = 5
USING_RUNS = 50  # last runs that are searched for users of an artefact
MOST = 64  # leases of unfinished artefacts, and pins, that are read


@dataclass(frozen=True)
class PastRun:
    """Describes a run as it was planned.

    Attributes:
        project: Project that it belongs to.
        at: Seconds since the epoch, by the store's clock.
        by: User, host and command.
        stages: Plan of every stage: its key, version, recipe and inputs.
        wanted: Stages that it was to make.
    """

    project: str
    at: float
    by: Mapping[str, str]
    stages: Mapping[str, PlannedStage]
    wanted: Collection[str]


@dataclass(frozen=True)
class Overview:
    """Holds the content of ``unclip show`` for a store.

    Attributes:
        url: URL of the store.
        runs: Last runs, the newest first.
        all_runs: Number of all runs.
        made: All complete artefacts.
        leases: Holders of unfinished artefacts, by their key.
        pinned: Keys of pinned artefacts.
        releases: Release of each project of these runs that has one, or the reason why it cannot be read.
    """

    url: str
    runs: Sequence[PastRun]
    all_runs: int
    made: frozenset[StageKey]
    leases: Mapping[str, Holder]
    pinned: frozenset[str]
    releases: Mapping[str, Move | str]


@dataclass(frozen=True)
class Lineage:
    """Holds the lineage of an artefact.

    Attributes:
        artifact: The artefact.
        behind: Artefacts that it was made from, directly or not; None where a record is gone.
        users: Artefacts that the last USING_RUNS runs made directly from it.
        pinned: A pin names it.
        released: Projects whose release it is.
    """

    artifact: Artifact
    behind: Mapping[StageKey, Artifact | None]
    users: Mapping[StageKey, Artifact]
    pinned: bool
    released: Sequence[str]


def overview(store: Store, project: str | None = None) -> Overview:
    """Returns the last runs of a project, or of all, and the running stages of the store."""
    entries = _run_entries(store, project)
    runs = _runs(store, entries[:SHOWN_RUNS])
    made = _made(store)
    keys = {key for _, key in made}
    # Leases of checkpoints lie in folders below.
    begun = [entry.path for entry in store.list("leases/") if entry.path.count("/") == 1]
    unfinished = [path for path in begun if _key(path) not in keys][:MOST]
    held = zip(unfinished, ordered_map(lambda path: _holder(store, path), unfinished), strict=True)
    leases = {_key(path): lease for path, lease in held if lease is not None}
    releases: dict[str, Move | str] = {}
    for name in dict.fromkeys(run.project for run in runs):
        try:
            current = read_releases(store, name).current
        except UserError as e:
            releases[name] = str(e)
        else:
            releases |= {name: current} if current is not None else {}
    return Overview(store.url, runs, len(entries), made, leases, _pinned(store), releases)


def find_artifact(store: Store, start: str) -> StageKey:
    """Returns the artefact of any stage whose key begins so. Raises UserError where there is none, or more than one."""
    made = sorted(name for name in _made(store) if start and name[1].startswith(start))
    if len(made) > 1:
        several = ", ".join(f"{stage} {key[:16]}" for stage, key in made[:5])
        raise UserError(f"{start}: {len(made)} artefacts in {store.url} have a key that begins with it: {several}")
    if not made:
        leases = (
            [entry.path for entry in store.list(lease_path(start).removesuffix(".json"))] if start.isalnum() else []
        )
        begun = ": it was begun and is not made yet" if leases else ""
        raise UserError(
            f"{start}: no artefact in {store.url} has a key that begins with it{begun}; unclip show without a key "
            "lists what the last runs made"
        )
    return made[0]


def lineage(store: Store, name: StageKey) -> Lineage:
    """Returns the lineage of an artefact. Raises UserError if its record is damaged."""
    artifact = _load(store, name)
    if artifact is None:
        raise UserError(
            f"{store.url}/{artifact_path(*name)} is damaged or gone; unclip run makes it again where it is needed"
        )
    behind: dict[StageKey, Artifact | None] = {}
    level = list(artifact.inputs.items())
    while level:
        behind |= dict(zip(level, ordered_map(lambda one: _load(store, one), level), strict=True))
        above = [one for made in map(behind.get, level) if made is not None for one in made.inputs.items()]
        level = [one for one in dict.fromkeys(above) if one not in behind]
    runs = _runs(store, _run_entries(store)[:USING_RUNS])
    asked = [(stage, of) for run in runs for stage, of in run.stages.items()]
    using = dict.fromkeys((stage, of.key) for stage, of in asked if of.inputs.get(name[0]) == name[1])
    users = zip(using, ordered_map(lambda one: _load(store, one), using), strict=True)
    return Lineage(
        artifact,
        behind,
        {one: made for one, made in users if made is not None},
        name[1] in _pinned(store),
        _released(store, name) if name[0] == "bundle" else (),
    )


def _made(store: Store) -> frozenset[StageKey]:
    names = (ARTIFACT_NAME.fullmatch(entry.path) for entry in store.list("artifacts/"))
    return frozenset((name["stage"], name["key"]) for name in names if name)


def _run_entries(store: Store, project: str | None = None) -> list[Entry]:
    """Returns the entries of runs, the newest first: of one project by number, of several by the store's clock."""
    # Each project counts its own runs.
    if project:
        return run_entries(store, project)[::-1]
    entries = [entry for entry in store.list("runs/") if RUN_NAME.fullmatch(entry.path)]
    return sorted(entries, key=lambda entry: (entry.modified, entry.path), reverse=True)


def _runs(store: Store, entries: Sequence[Entry]) -> list[PastRun]:
    records = zip(entries, ordered_map(lambda entry: peek_record(store, entry.path, RunRecord), entries), strict=True)
    return [
        PastRun(run.project, entry.modified, run.by, run.stages, run.wanted)
        for entry, run in records
        if run is not None
    ]


def _holder(store: Store, path: str) -> Holder | None:
    try:
        return read_lease(store, path)
    except CorruptObject:
        return None


def _pinned(store: Store) -> frozenset[str]:
    paths = [entry.path for entry in store.list("locks/") if re.fullmatch(r"locks/[0-9a-f]{64}\.json", entry.path)]
    return frozenset(key for key in ordered_map(lambda path: read_pin(store, path), paths[:MOST]) if key)


def _released(store: Store, name: StageKey) -> list[str]:
    found = []
    for project in released_projects(store):
        try:
            current = read_releases(store, project).current
        except UserError:  # unclip release reports a damaged pointer
            continue
        if current is not None and current.bundle == name[1]:
            found.append(project)
    return found


def _load(store: Store, name: StageKey) -> Artifact | None:
    return peek_record(store, artifact_path(*name), Artifact)


def _key(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".json")
