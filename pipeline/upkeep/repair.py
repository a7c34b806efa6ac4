"""Quarantines damaged objects, with the records that name them, so that the next run makes them again.

A quarantined object is copied to damaged/ and then deleted. Nothing reads it there: it is for a person to look at, and
is collected with other garbage. What a pin, a release or a list names stays as it is, since nothing can
make that again as it was.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.data.source.journal import FOLDER as LIST
from pipeline.data.source.journal import read_journal
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import SEGMENTS, Artifact, read_shards, shard_path
from pipeline.graph.plan import read_pin
from pipeline.release.pointer import read_releases, release_path, released_projects
from pipeline.store import Store
from pipeline.store.crash import crash_point
from pipeline.store.names import is_blob_or_record
from pipeline.store.parallel import ordered_map
from pipeline.store.records import Record, blob_path, peek_record
from pipeline.upkeep.live_set import LiveSet, read_or_tell, record_kind

FOLDER = "damaged/"


def quarantine(store: Store, paths: Iterable[str]) -> None:
    """Moves blobs and records to damaged/, each under its path and the sha256 of its bytes.

    Missing objects are passed over.

    Raises UserError for a protected object (see ``protected_objects``) and for a path that is neither a blob's nor a
    record's. Then everything stays.
    """
    paths = sorted(set(paths))
    if foreign := [path for path in paths if not is_blob_or_record(path)]:
        raise UserError(f"{store.url}: {foreign[0]!r} is neither a blob nor a record; only these can be made again")
    for path in paths:
        try:
            data = store.read(path)
        except FileNotFoundError:
            continue
        with TemporaryDirectory() as folder:  # from a file, since one request cannot create an object over 5 GiB
            file = Path(folder, "damaged")
            file.write_bytes(data)
            store.create(f"{FOLDER}{path}.{hashlib.sha256(data).hexdigest()[:16]}", file, move=True)
    protected = protected_objects(store)  # after the copies, which take long: somebody may have released one meanwhile
    for path in filter(protected.__contains__, paths):
        raise UserError(f"{store.url}/{path}: {protected[path]}")
    crash_point("damage.before_delete", paths[0])
    store.delete(paths)


def protected_objects(store: Store) -> dict[str, str]:
    """Returns the paths that pins, releases and lists name, each with what names it and what to do if it is lost.

    These are the artefacts of pins, released bundles, their evaluations and models, with their blobs, and rows that a
    list tries again. Raises UserError if a pin, a list's journal or the pointer of a release cannot be read.
    """
    made = {entry.path.rpartition("/")[2].removesuffix(".json"): entry.path for entry in store.list("artifacts/")}
    found: dict[str, str] = {}

    def note(path: str, by: str, way_out: str) -> None:
        words = f"it stays, because {by} names it: put a sound copy in its place; if there is none, {way_out}"
        found.setdefault(path, f"{words}, and run again")

    def protect(key: str, by: str, way_out: str = "") -> Iterable[str]:
        """Adds an artefact and its blobs. Returns the keys of its inputs, none if its record cannot be read."""
        if key not in made:
            return ()
        record = peek_record(store, made[key], Artifact)
        note(made[key], by, "delete it")
        for path in map(blob_path, record.named if record else ()):
            note(path, by, way_out or f"delete it and {made[key]}")
        return record.inputs.values() if record else ()

    for project in released_projects(store):
        by, way_out = f"the release of {project}", f"roll it back, or delete {release_path(project)}"
        for move in read_releases(store, project).active:
            for key in (move.evaluation, *protect(move.bundle, by, way_out)):
                protect(key, by, way_out)
    for entry in store.list("locks/"):
        if entry.path.startswith(LIST):
            project = entry.path.removeprefix(LIST).removesuffix(".json")
            for blob in read_journal(store, project).retries:
                note(blob_path(blob), f"the list of {project}", f"take it out of the retries in {entry.path}")
        elif entry.path.endswith(".json") and (pinned := read_pin(store, entry.path)):
            protect(pinned, f"the pin {entry.path}")
    return found


def find_namers(
    store: Store, blobs: Collection[str]
) -> tuple[Mapping[str, Collection[str]], Mapping[str, CorruptObject]]:
    """Returns which records of a store name each of some blobs (paths), and the tables of shards that are damaged.

    Reads every artefact and its table; other shards for a blob that none of these name, and those of a stage whose
    artefact has one that is in no table: a pass of its workers may have made it.
    """
    named: dict[str, dict[str, None]] = defaultdict(dict)
    tables: dict[str, CorruptObject] = {}
    passes: set[str] = set()

    def note(path: str, names: Iterable[str]) -> None:
        for blob in {*map(blob_path, names)}.intersection(blobs):
            named[blob][path] = None

    def read(path: str) -> tuple[str, Record | None]:
        return path, read_or_tell(store, path, record_kind(path), LiveSet())

    def note_all(prefix: str) -> None:
        paths = (entry.path for entry in store.list(prefix) if "/attempts/" not in entry.path)
        for path, record in ordered_map(read, paths):
            note(path, record.named if record else ())
            if isinstance(record, Artifact) and not {*map(blob_path, record.blobs.values())}.isdisjoint(blobs):
                passes.add(f"shards/{record.stage}/")
            if isinstance(record, Artifact) and record.shard_table:
                try:
                    rows = read_shards(store, record)
                except CorruptObject as e:
                    tables[e.path] = e
                    note(path, [record.shard_table])
                    continue
                for row in rows:
                    note(shard_path(record.stage, row.key), row.blobs.values())
                note(path, (blob for row in rows for blob in row.blobs.values()))

    for prefix in ("artifacts/", SEGMENTS, "checkpoints/"):
        note_all(prefix)
    if not named.keys() >= set(blobs):  # an interrupted run has left shards that no artefact lists
        passes = {"shards/"}
    for prefix in sorted(passes):
        note_all(prefix)
    return named, tables
