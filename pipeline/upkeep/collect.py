"""Collects garbage: marks it first, and deletes it in a later run, after a grace period.

So readers and writers already in flight can finish. A blob that is made again in the very seconds of its deletion is
missing afterwards, and made again as any damaged blob.
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
from pipeline.upkeep.reachable import Live, mark_blobs, told
from pipeline.upkeep.roots import find_live

log = logging.getLogger("unclip")
TOMBSTONES = "locks/tombstones.json.gz"
MOST_UNPACKED = 256 << 20  # bytes of tombstones, over two million of them
RECORDS = ("runs/", "leases/", "artifacts/", "shards/", "checkpoints/")  # before what they name
NAMED = ("packages/", "blobs/", "damaged/")
NAMING_BLOBS = ("shards/", "checkpoints/")
DECIDING = ("releases/", "runs/", "artifacts/", "locks/")  # locks: pins, and what is decided about lists


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
    """Holds what a collection found, by kind (blobs, shards ...), and what it deleted.

    ``unreadable``: why an object could not be read, and what to do, by path. It stays, with all that it may name.
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
        delete: Marks and deletes; False only looks.

    Raises:
        UserError: another collection runs, or the store is of another format.
    """
    standing = store.stat(TOMBSTONES)
    earlier = _marked(store.read(TOMBSTONES)) if standing else {}
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
    found.unreadable = {path: told(path, e) for path, e in live.unreadable.items()}
    if not delete:
        return found
    if _names(store, DECIDING) - known:  # a run has begun or finished something meanwhile, or somebody pinned
        _, live = _find_live(store, keep_s, now)
    for path, _ in sorted(_names(store, NAMING_BLOBS) - known):
        live.paths.add(path)
        mark_blobs(store, path, live)
    found.unreadable = {path: told(path, e) for path, e in live.unreadable.items()}
    due = [path for path in due if path not in live]
    packed = gzip.compress(_as_json(tombstones), mtime=0)
    if not store.swap(TOMBSTONES, standing.version if standing else None, packed):
        raise UserError(f"another collection runs in {store.url}; let it finish")
    crash_point("gc.before_delete")
    store.delete(due)
    for path in due:
        found.deleted[path.partition("/")[0]].add(sizes[path])
    found.abandoned = store.clear_abandoned(now - grace_s)
    return found


def _as_json(tombstones: Mapping[str, float]) -> bytes:
    """Returns as many marks as may be unpacked again. What is beyond them is marked by a later collection."""
    marks, size = [], 2
    for path, since in tombstones.items():
        mark = f"{json.dumps(path)}: {since!r}"
        size += len(mark) + 2
        if size > MOST_UNPACKED:
            break
        marks.append(mark)
    return f"{{{', '.join(marks)}}}".encode()


def _marked(packed: bytes) -> dict[str, float]:
    """Returns since when objects have been marked; none, with a warning, where that is damaged."""
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            data = file.read(MOST_UNPACKED + 1)
        if len(data) > MOST_UNPACKED:
            raise ValueError("too much")
        return parse_object(data, dict[str, FiniteFloat])
    except (OSError, EOFError, zlib.error, ValueError):
        log.warning("%s is damaged: all garbage is marked from now on, and deleted after the grace period", TOMBSTONES)
        return {}


def _find_live(store: Store, keep_s: float, now: float) -> tuple[set[tuple[str, str]], Live]:
    """Returns all records before the look, with their versions, and what is needed."""
    known = _names(store, (*DECIDING, *NAMING_BLOBS))
    return known, find_live(store, keep_s, now)


def _names(store: Store, prefixes: tuple[str, ...]) -> set[tuple[str, str]]:
    return {(entry.path, entry.version) for prefix in prefixes for entry in store.list(prefix)}
