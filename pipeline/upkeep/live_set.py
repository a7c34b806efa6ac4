"""The live set of a garbage collection, and how records are read for it: one that cannot be read ends no collection."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.data.source.journal import FOLDER as LIST
from pipeline.data.source.segments import Segment
from pipeline.errors import CorruptObject, OtherFormat
from pipeline.graph.artifacts import SEGMENTS, Artifact, Shard
from pipeline.graph.records import RunRecord
from pipeline.release.pointer import FOLDER as RELEASES
from pipeline.store import Store
from pipeline.store.names import is_blob_or_record
from pipeline.store.records import R, Record, blob_path, read_record
from pipeline.training.records import CheckpointRecord

ONLY_NAMED = ("packages/", "blobs/")  # kept while a record that may name them cannot be read
REMEDIES = {
    RELEASES: "restore it, or delete it and promote again",
    LIST: "restore it: without it, what was forgotten comes back with the next run",
    "locks/": "delete it, and pin again",
    "": "delete it",
}
"""What to do about an object that cannot be read and is not made again, by how its path begins."""
REPAIR = "unclip data check --repair quarantines it, and unclip run makes it again where it is needed"


@dataclass
class LiveSet:
    """Holds the objects that a garbage collection keeps.

    Attributes:
        paths: Paths of objects.
        given: Paths of blobs that recipes name, which may lie in files of the user's in place of the store.
        prefixes: Beginnings of paths under which everything stays because a stage is not finished.
        unreadable: Fault of each object that cannot be read and stays, by its path.
        unknown: Unreadable objects may name any blob. Blobs that nothing names stay then, unless they are ``disowned``.
        disowned: Blobs that garbage names.
    """

    paths: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)
    prefixes: set[str] = field(default_factory=set)
    unreadable: dict[str, CorruptObject | OtherFormat] = field(default_factory=dict)
    unknown: bool = False
    disowned: set[str] = field(default_factory=set)

    def __contains__(self, path: str) -> bool:
        if path in self.paths or path in self.given or path in self.unreadable or path.startswith(tuple(self.prefixes)):
            return True
        return self.unknown and path.startswith(ONLY_NAMED) and path not in self.disowned


def mark_blobs(store: Store, path: str, live: LiveSet) -> None:
    """Marks the blobs that the record of a shard, a checkpoint or a segment of the list names."""
    if "/attempts/" in path:
        return
    record = read_or_tell(store, path, record_kind(path), live)
    live.paths.update(map(blob_path, record.named if record else ()))
    # Work makes the shard of a damaged record again, but a checkpoint may be readable to another machine.
    live.unknown = live.unknown or (path in live.unreadable and path.startswith("checkpoints/"))


def record_kind(path: str) -> type[Record]:
    """Returns the kind of the record at a path."""
    if path.startswith("shards/"):
        return Segment if path.startswith(SEGMENTS) else Shard
    return {"artifacts": Artifact, "runs": RunRecord, "checkpoints": CheckpointRecord}[path.partition("/")[0]]


def read_or_tell(store: Store, path: str, kind: type[R], live: LiveSet) -> R | None:
    """Returns a record, None if it is missing or cannot be read: then ``live`` says why, and it stays where it is."""
    try:
        return read_record(store, path, kind)
    except (CorruptObject, OtherFormat) as e:
        live.unreadable[path] = e
        return None


def fault_text(path: str, error: CorruptObject | OtherFormat) -> str:
    """Returns why an object cannot be read, and what a person can do about it."""
    return error.why if isinstance(error, OtherFormat) else f"{error.why}; {remedy(path)}"


def remedy(path: str) -> str:
    """Returns what to do about a damaged object."""
    if is_blob_or_record(path):
        return REPAIR
    return next(todo for prefix, todo in REMEDIES.items() if path.startswith(prefix))
