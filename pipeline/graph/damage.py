"""Sets damaged objects aside with a warning, so that their work is done again, unless something depends on them.

An object is set aside by copying it to damaged/ and then deleting it. Nothing reads it there: it is for a person to
look at, and is collected with other garbage.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.errors import CorruptObject, UserError
from pipeline.graph.kinds import Artifact, Pin
from pipeline.graph.pointer import read_releases, release_path, released_projects
from pipeline.store import Store
from pipeline.store.crash import crash_point
from pipeline.store.names import Digest, is_blob_or_record
from pipeline.store.records import R, blob_path, open_record, peek_record, read_plain, seal

FOLDER = "damaged/"
LIST = "locks/list-"


@dataclass(frozen=True)
class _Retries:
    """The blobs of rows that a list tries again, of all that its journal holds (see pipeline.data.source.journal)."""

    retries: tuple[Digest, ...]


log = logging.getLogger("unclip")


def create_record(store: Store, path: str, record: R) -> R:
    """Creates a record, or adopts the one that somebody else created first. Returns the one that stands.

    Raises ValueError for one that no reader would take, and UserError as ``set_aside``.
    """
    while not store.create(path, seal(record, path)):
        standing = read_record(store, path, type(record))
        if standing is not None:
            return standing
    return record


def read_record(store: Store, path: str, kind: type[R]) -> R | None:
    """Returns a record of this kind, or None if there is none to be trusted. Sets a damaged one aside with a warning.

    Raises OtherFormat, and UserError as ``set_aside``.
    """
    try:
        return open_record(store, path, kind)
    except CorruptObject as e:
        set_aside(store, [path])
        log.warning("%s/%s %s; it is set aside in %s, and its work done again", store.url, path, e.why, FOLDER)
        return None


def set_aside(store: Store, paths: Iterable[str]) -> None:
    """Moves blobs and records to damaged/, each under its path and the sha256 of its bytes.

    Missing objects are passed over.

    Raises UserError where a pin, a release or a list names one of them, for nothing can make that again as it was, and
    for a path that is neither a blob's nor a record's. Then everything stays.
    """
    paths = list(dict.fromkeys(paths))
    if foreign := [path for path in paths if not is_blob_or_record(path)]:
        raise UserError(
            f"{store.url}: {foreign[0]!r} looks damaged, and is neither a blob nor a record: see to it by hand"
        )
    named = stands_on(store) if any(path.startswith(("blobs/", "artifacts/")) for path in paths) else {}
    for path in filter(named.__contains__, paths):
        by, way_out = named[path]
        raise UserError(
            f"{store.url}/{path} is damaged or missing, and stays as it is, because {by} names it: put a sound copy in "
            f"its place; if there is none, {way_out}"
        )
    for path in paths:
        try:
            data = store.read(path)
        except FileNotFoundError:
            continue
        with TemporaryDirectory() as folder:  # from a file, since one request cannot create an object over 5 GiB
            file = Path(folder, "damaged")
            file.write_bytes(data)
            store.create(f"{FOLDER}{path}.{hashlib.sha256(data).hexdigest()[:16]}", file, move=True)
    crash_point("damage.before_delete", paths[0] if paths else "")
    store.delete(paths)


def stands_on(store: Store) -> dict[str, tuple[str, str]]:
    """Returns the paths that pins, releases and lists name, each with what names it and what to do where it is lost.

    These are the artefacts of pins, released bundles, their evaluations and models, with their blobs, and rows that a
    list tries again. Raises UserError if a pin or the pointer of a release cannot be read.
    """
    made = {entry.path.rpartition("/")[2].removesuffix(".json"): entry.path for entry in store.list("artifacts/")}
    found: dict[str, tuple[str, str]] = {}

    def stand(key: str, by: str, way_out: str = "") -> Iterable[str]:
        """Adds an artefact and its blobs. Returns the keys of its inputs, none without a record to be trusted."""
        if key not in made:
            return ()
        record = peek_record(store, made[key], Artifact)
        found.setdefault(made[key], (by, "delete it, and run again"))
        for path in map(blob_path, record.named if record else ()):
            found.setdefault(path, (by, way_out or f"delete it and {made[key]}, and run again"))
        return record.inputs.values() if record else ()

    for project in released_projects(store):
        by, way_out = f"the release of {project}", f"roll it back, or delete {release_path(project)}, and run again"
        for move in read_releases(store, project).standing:
            for key in (move.evaluation, *stand(move.bundle, by, way_out)):
                stand(key, by, way_out)
    for entry in store.list("locks/"):
        if entry.path.startswith(LIST):
            project = entry.path.removeprefix(LIST).removesuffix(".json")
            way_out = f"take it out of the retries in {entry.path}, and run again"
            for blob in _retries(store, entry.path):
                found.setdefault(blob_path(blob), (f"the list of {project}", way_out))
        elif entry.path.endswith(".json"):
            with suppress(FileNotFoundError):  # the pin is lifted meanwhile
                stand(pinned_key(store, entry.path), f"the pin {entry.path}")
    return found


def _retries(store: Store, path: str) -> tuple[str, ...]:
    """Returns the blobs of rows that a list tries again. Raises UserError if its journal is damaged."""
    try:
        found = read_plain(store, path, _Retries)
    except CorruptObject:
        raise UserError(f"{store.url}/{path} is damaged: restore it, or name another store to begin again") from None
    return found.retries if found else ()


def pinned_key(store: Store, path: str) -> str:
    """Returns the key that a pin names. Raises FileNotFoundError, and UserError if the pin is damaged."""
    try:
        pin = read_plain(store, path, Pin)
    except CorruptObject:
        raise UserError(
            f"{store.url}/{path} is damaged, and nobody can tell what it pins: delete it, and pin again"
        ) from None
    if pin is None:
        raise FileNotFoundError(path)
    return pin.key
