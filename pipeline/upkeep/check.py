"""Verifies the records and blobs that a project needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from pipeline.errors import CorruptObject, OtherFormat, UserError
from pipeline.progress import Progress
from pipeline.store import Store
from pipeline.store.names import is_blob_or_record
from pipeline.store.parallel import ordered_map
from pipeline.store.records import check_blob
from pipeline.upkeep.live_set import LiveSet, read_or_tell, record_kind, remedy
from pipeline.upkeep.repair import find_namers, protected_objects, quarantine
from pipeline.upkeep.roots import find_live


@dataclass(frozen=True)
class Damage:
    """Describes a damaged or missing object.

    Attributes:
        path: Path in the store.
        why: Fault that was found.
        records: Paths of the records that name it.
        stays: Reason why it cannot be quarantined, and what to do; "" where it can.
    """

    path: str
    why: str
    records: Sequence[str] = ()
    stays: str = ""

    @property
    def stages(self) -> set[str]:
        """Returns the stages that the next run makes again in part, once the object is quarantined."""
        paths = (self.path, *self.records)
        return {path.split("/")[1] for path in paths if path.startswith(("artifacts/", "shards/"))}


@dataclass(frozen=True)
class CheckResult:
    """Holds the result of a verification.

    Attributes:
        records: Number of sound records.
        blobs: Paths of sound blobs.
        size: Bytes of these blobs.
        damage: Objects that are damaged or missing.
    """

    records: int
    blobs: Sequence[str]
    size: int
    damage: Sequence[Damage]


def verify_store(
    store: Store, project: str, keep_s: float, names: Collection[str] = (), sound: Collection[str] = ()
) -> CheckResult:
    """Verifies what a project's runs of the last ``keep_s`` seconds need, and the store's pins, releases and lists.

    Records are read first, then blobs, but for those known to be ``sound``. With ``names`` (paths) only those are
    verified. Changes nothing. Raises UserError for a name that is neither a blob's nor a record's, and as
    ``protected_objects`` if something is damaged.
    """
    live = _named(store, names) if names else find_live(store, keep_s, store.now(), project)
    found = dict(live.unreadable)
    blobs = sorted(path for path in live.paths if path.startswith("blobs/") and path not in sound)
    sizes: list[int] = []
    with Progress("data check", len(blobs), "blobs") as progress:

        def note() -> str:
            return f"{sum(sizes) / 2**20 / progress.seconds:,.1f} MiB/s, {len(found):,} damaged"

        for path, size in ordered_map(lambda path: (path, _verify(store, path)), blobs):
            if isinstance(size, CorruptObject):
                found.setdefault(path, size)
            else:
                sizes.append(size)
            progress.advance(1, note)
    suspects = {path for path in {*found, *names} if path.startswith("blobs/")}
    named, tables = find_namers(store, suspects) if suspects else ({}, {})
    found |= {path: e for path, e in tables.items() if path in names}
    protected = protected_objects(store) if found else {}
    damage = []
    for path, why in sorted(found.items()):
        by = tuple(named.get(path, ()))
        stays = next((protected[one] for one in (path, *by) if one in protected), "")
        if isinstance(why, OtherFormat):  # not damage: another version of this software can read it
            stays = "it stays"
        elif not is_blob_or_record(path):
            stays = remedy(path)
        damage.append(Damage(path, why.why, by, stays))
    records = sum(not path.startswith("blobs/") for path in live.paths - found.keys())
    return CheckResult(records, [path for path in blobs if path not in found], sum(sizes), damage)


def repair_store(store: Store, project: str, keep_s: float, names: Collection[str] = ()) -> CheckResult:
    """Verifies, and quarantines what is damaged with the records that name it. Raises UserError like both."""
    found = verify_store(store, project, keep_s, names)
    gone, doomed = list[Damage](), _doomed(found)
    # Again until nothing is found: without a quarantined artefact the next run reads other objects, such as the records
    # of its shards, which were not needed before.
    while doomed:
        quarantine(store, doomed)
        gone += [damage for damage in found.damage if not damage.stays]
        if names:
            return replace(found, damage=[*gone, *(damage for damage in found.damage if damage.stays)])
        more = verify_store(store, project, keep_s, (), {*found.blobs})
        found = replace(more, blobs=[*found.blobs, *more.blobs], size=found.size + more.size)
        doomed = _doomed(found) - doomed
    return replace(found, damage=[*gone, *found.damage])


def _doomed(found: CheckResult) -> set[str]:
    return {path for damage in found.damage if not damage.stays for path in (damage.path, *damage.records)}


def _named(store: Store, names: Collection[str]) -> LiveSet:
    live = LiveSet(paths={*names})
    for path in names:
        if not is_blob_or_record(path):
            raise UserError(f"{path!r} is neither a blob nor a record of a store; only these can be made again")
        if not path.startswith("blobs/"):
            read_or_tell(store, path, record_kind(path), live)
    return live


def _verify(store: Store, path: str) -> int | CorruptObject:
    """Returns the size of a blob in bytes, or its damage."""
    try:
        return check_blob(store, path.rpartition("/")[2])
    except CorruptObject as e:
        return e
