"""Upgrades a store in place: records of older formats are written anew in today's, under the keys that they have.

Blobs, pins and journals have had one format since the first version. Until the last record is upgraded other commands
refuse the store, or what they need of it, in one line; an upgrade that was interrupted goes on.
"""

from __future__ import annotations

import re
from calendar import timegm
from dataclasses import dataclass, field
from time import strptime

from pipeline.errors import CorruptObject, OtherFormat, UserError
from pipeline.progress import Progress
from pipeline.release.pointer import FOLDER as RELEASES
from pipeline.release.pointer import Pointer
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.store.records import Record, read_older, seal
from pipeline.upkeep.live_set import record_kind

FOLDER = "upgrade/"  # copies of records that are being replaced, in today's format
REPLACED = ("artifacts/", "shards/", "checkpoints/")
RUNS = "runs/"
# Runs come last: garbage collection keeps everything while a run cannot be read.
KINDS = (*REPLACED, RELEASES, RUNS)
DATED = re.compile(r"(?P<folder>runs/\w[\w.-]*/)(?P<time>[0-9]{8}T[0-9]{6})[^/]*\.json")
"""The path of a run's record in the formats 1 and 2."""


@dataclass
class UpgradeResult:
    """Counts what an upgrade has done.

    Attributes:
        upgraded: Number of records that were written anew.
        current: Number of records that were of today's format.
        failed: Fault of each record that stays as it was, by path.
    """

    upgraded: int = 0
    current: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def upgrade_store(store: Store) -> UpgradeResult:
    """Upgrades all records of a store, of all its projects. Nothing else may work on the store meanwhile.

    Raises UserError if somebody moves a release meanwhile.
    """
    for entry in [*store.list(FOLDER)]:
        if (path := entry.path.removeprefix(FOLDER)).startswith(REPLACED):
            _settle(store, path, store.read(entry.path))
    found = UpgradeResult()
    paths = {prefix: [each.path for each in store.list(prefix) if "/attempts/" not in each.path] for prefix in KINDS}
    with Progress("data upgrade", sum(map(len, paths.values())), "records") as progress:
        for prefix in KINDS:
            outcomes = ordered_map(lambda path: _try(store, path), paths[prefix])
            for path, outcome in zip(paths[prefix], outcomes, strict=True):
                if isinstance(outcome, str):
                    found.failed[path] = outcome
                else:
                    found.upgraded += outcome
                    found.current += not outcome
                progress.advance(1)
    return found


def _try(store: Store, path: str) -> bool | str:
    """Returns whether a record was of an older format, or its fault."""
    try:
        return _upgrade(store, path)
    except (CorruptObject, OtherFormat) as e:
        return e.why


def _upgrade(store: Store, path: str) -> bool:
    kind: type[Record] = Pointer if path.startswith(RELEASES) else record_kind(path)
    today, standing = _today(path), store.stat(path)
    record = read_older(store, path, kind, today)
    if record is None or standing is None:
        return False
    data = seal(record, today)
    if path.startswith(RELEASES):
        if not store.swap(path, standing.version, data):
            raise UserError(f"{store.url}/{path} was moved meanwhile; end all work on this store, and upgrade it again")
    elif path.startswith(RUNS):
        store.create(today, data)
        store.delete([path])
    else:
        # No object but those of releases, pins and leases is ever overwritten, so a copy waits while none stands there.
        store.create(f"{FOLDER}{path}", data)
        store.delete([path])
        _settle(store, path, data)
    return True


def _settle(store: Store, path: str, data: bytes) -> None:
    """Puts a copy in its place, unless a record stands there."""
    store.create(path, data)
    store.delete([f"{FOLDER}{path}"])


def _today(path: str) -> str:
    """Returns the path that a record has in today's format: runs were named by the time, and are numbered now."""
    dated = DATED.fullmatch(path)
    if not dated:
        return path
    # Before number 1, and among each other by their times.
    seconds = timegm(strptime(dated["time"], "%Y%m%dT%H%M%S"))
    return f"{dated['folder']}00000000-{seconds:08x}.json"
