"""Collects garbage in two phases: marks it, and deletes it in a later collection, after a grace period.

So readers and writers in flight can finish. A blob that is made again during its deletion is missing afterwards, and is
then made once more like any damaged blob.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import FiniteFloat

from pipeline.errors import UserError
from pipeline.store import Store
from pipeline.store.crash import crash_point
from pipeline.store.records import parse_object
from pipeline.upkeep.live_set import LiveSet, fault_text, mark_blobs
from pipeline.upkeep.roots import find_live

log = logging.getLogger("unclip")
TOMBSTONES = "locks/tombstones.json.gz"
MOST_UNPACKED = 256 << 20  # bytes of tombstones, over two million of them
RECORDS = ("runs/", "leases/", "artifacts/", "shards/", "checkpoints/")  # deleted before the objects that they name
NAMED = ("packages/", "blobs/", "damaged/")
NAMING_BLOBS = ("shards/", "checkpoints/")
DECIDING = ("releases/", "runs/", "artifacts/", "locks/")  # roots; locks are pins and journals of lists


@dataclass
class Tally:
    """Counts objects and bytes of one kind."""

    objects: int = 0
    size: int = 0

    def add(self, size: int) -> None:
        self.objects += 1
        self.size += size


@dataclass
class Collection:
    """Holds the result of a collection: counts by kind of object (blobs, shards ...).

    Attributes:
        needed: Objects that are needed.
        garbage: Objects that are not.
        deleted: Garbage that was deleted.
        abandoned: Number of half-written objects that were deleted.
        unreadable: Fault of each object that could not be read, and what to do, by path. It stays, with all that it
            may name.
    """

    needed: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    garbage: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    deleted: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    abandoned: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)


def collect(store: Store, keep_s: float, grace_s: float, now: float, delete: bool) -> Collection:
    """Finds garbage; with ``delete``, marks it and deletes what has been marked for ``grace_s`` seconds.

    Args:
        store: The store to collect in.
        keep_s: Seconds for which the results of a run are needed.
        grace_s: Seconds between mark and deletion.
        now: Time by the store's clock (``Store.now``), as the clocks of machines differ.
        delete: Garbage is marked and deleted; with False it is only counted.

    Raises:
        UserError: Another collection runs, or the store is of another format.
    """
    previous = store.stat(TOMBSTONES)
    earlier = _marked(store.read(TOMBSTONES)) if previous else {}
    known, live = _find_live(store, keep_s, now)
    found = Collection()
    tombstones: dict[str, float] = {}
    due: list[str] = []
    sizes: dict[str, int] = {}
    for prefix in (*RECORDS, *NAMED):
        kind = prefix[:-1]
        for entry in store.list(prefix):
            if entry.path in live:
                found.needed[kind].add(entry.size)
                continue
            found.garbage[kind].add(entry.size)
            since = min(earlier.get(entry.path, now), now)
            if now - since >= grace_s and (entry.path in earlier or grace_s == 0):
                due.append(entry.path)
                sizes[entry.path] = entry.size
            else:
                tombstones[entry.path] = since
    found.unreadable = {path: fault_text(path, e) for path, e in live.unreadable.items()}
    if not delete:
        return found
    # A run may have begun or finished something since, or somebody may have pinned or released: then look again.
    if _names(store, DECIDING) - known:
        _, live = _find_live(store, keep_s, now)
    # New records of shards and checkpoints stay whatever they are for: they may name blobs that were garbage before.
    for path, _ in sorted(_names(store, NAMING_BLOBS) - known):
        live.paths.add(path)
        mark_blobs(store, path, live)
    found.unreadable = {path: fault_text(path, e) for path, e in live.unreadable.items()}
    due = [path for path in due if path not in live]
    packed = gzip.compress(_as_json(tombstones), mtime=0)
    # Before the deletion: of two collections at once the one that loses this swap deletes nothing.
    if not store.swap(TOMBSTONES, previous.version if previous else None, packed):
        raise UserError(f"another collection runs in {store.url}; let it finish")
    crash_point("gc.before_delete")
    store.delete(due)
    for path in due:
        found.deleted[path.partition("/")[0]].add(sizes[path])
    found.abandoned = store.clear_abandoned(now - grace_s)
    return found


def _as_json(tombstones: Mapping[str, float]) -> bytes:
    """Returns marks up to the size that ``_marked`` unpacks. Garbage beyond them is marked by a later collection."""
    marks, size = [], 2
    for path, since in tombstones.items():
        mark = f"{json.dumps(path)}: {since!r}"
        size += len(mark) + 2
        if size > MOST_UNPACKED:
            break
        marks.append(mark)
    return f"{{{', '.join(marks)}}}".encode()


def _marked(packed: bytes) -> dict[str, float]:
    """Returns the times of marks by path; none, with a warning, where the tombstones are damaged."""
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            data = file.read(MOST_UNPACKED + 1)
        if len(data) > MOST_UNPACKED:
            raise ValueError("too much")
        return parse_object(data, dict[str, FiniteFloat])
    except (OSError, EOFError, zlib.error, ValueError):
        log.warning("%s is damaged: all garbage is marked from now on, and deleted after the grace period", TOMBSTONES)
        return {}


def _find_live(store: Store, keep_s: float, now: float) -> tuple[set[tuple[str, str]], LiveSet]:
    """Returns all records with their versions, listed before the search, and the live objects."""
    known = _names(store, (*DECIDING, *NAMING_BLOBS))
    return known, find_live(store, keep_s, now)


def _names(store: Store, prefixes: tuple[str, ...]) -> set[tuple[str, str]]:
    return {(entry.path, entry.version) for prefix in prefixes for entry in store.list(prefix)}
