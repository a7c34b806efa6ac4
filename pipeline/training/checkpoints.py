"""Writes and reads checkpoints: tensors named by content, and a record that is published last.

A trajectory (a recipe without its stop) owns checkpoints/<trajectory>/. Every start of a training is an attempt with a
number of its own, taken by a conditional create; an attempt that sees a higher number stops. A training goes on from
the newest readable checkpoint.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from models.tensors import save_tensors
from pipeline.errors import CorruptObject, Superseded
from pipeline.graph.stages import Context, trajectory_key, trunk_key
from pipeline.store import Store
from pipeline.store.crash import crash_point
from pipeline.store.records import blob_path, create_record, peek_record, put_blob, read_record
from pipeline.training.distributed.sharding import first_row, is_saved, is_sharded, local
from pipeline.training.journal import MetricsJournal
from pipeline.training.records import CheckpointRecord, SavedJournal
from pipeline.training.saved_tensors import MOST_HEADER, read_about, read_tensors
from pipeline.training.state import TrainState, forms, parts, put_back

PartBlob = tuple[str, str]  # a part and its blob
Collect = Callable[[list[PartBlob]], list[PartBlob]]
NAME = re.compile(r"[0-9]{12}-[0-9]{4,}\.json")  # of a checkpoint: its samples and its attempt
ATTEMPT = re.compile(r"([0-9]{4,})\.json")
log = logging.getLogger("unclip")


@dataclass(frozen=True)
class Snapshot:
    """Holds what a worker saves of a state, in the memory of the CPU.

    Attributes:
        samples: Samples seen so far.
        seconds: Seconds of the training so far; ``laps`` has them by phase.
        journal: The metrics so far.
        tensors: Tensors by part and name.
        starts: The place of the first row of each sharded tensor, by part and name.
        wait: Returns when a GPU has copied the tensors.
    """

    samples: int
    seconds: float
    laps: Mapping[str, float]
    journal: SavedJournal
    tensors: Mapping[str, Mapping[str, Tensor]]
    starts: Mapping[str, Mapping[str, int]]
    wait: Callable[[], None] = lambda: None


def snapshot(state: TrainState, first: bool = True) -> Snapshot:
    """Copies what a checkpoint holds of this worker, so that later steps do not change it.

    A GPU copies to pinned memory, between the steps before and after, and nobody waits for it. Rank 0 (``first``) also
    copies what every worker has. Of several copies of a model only the first is saved.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    starts: dict[str, dict[str, int]] = {}
    for part, values in parts(state).items():
        own = {name: tensor.detach() for name, tensor in values.items() if first or is_saved(tensor)}
        if not own and not first:  # another worker saves the same rows
            continue
        tensors[part] = {name: _copied(local(tensor)) for name, tensor in own.items()}
        starts[part] = {name: first_row(tensor) for name, tensor in own.items() if is_sharded(tensor)}
    journal = deepcopy(state.journal.saved())
    device = next(state.model.parameters()).device
    wait = torch.cuda.current_stream(device).record_event().synchronize if device.type == "cuda" else (lambda: None)
    return Snapshot(state.samples, state.seconds, dict(state.phase_seconds), journal, tensors, starts, wait)


def _copied(tensor: Tensor) -> Tensor:
    """Returns a copy in the memory of the CPU, which a GPU has yet to make."""
    pinned = tensor.device.type == "cuda"
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor, non_blocking=pinned)


@dataclass(frozen=True)
class Checkpoints:
    """Reads and writes the checkpoints of one trajectory for one attempt, and keeps the newest ``keep`` of them.

    Where the learning rate falls, checkpoints of up to ``fork`` samples are those of the ``trunk``, on which it stays.
    """

    store: Store
    trajectory: str
    attempt: int
    keep: int = 2
    trunk: Checkpoints | None = None
    fork: int = 0

    @property
    def folder(self) -> str:
        return f"checkpoints/{self.trajectory}/"

    def publish(self, taken: Snapshot, rank: int = 0, collect: Collect = list) -> None:
        """Publishes a snapshot. Raises Superseded if a later attempt has begun.

        All parts are stored at once. Where the state is sharded, each worker stores its blobs, ``collect`` gathers
        their names, and rank 0 publishes the record.
        """
        if self.trunk and taken.samples <= self.fork:
            self.trunk.publish(taken, rank, collect)
            return
        taken.wait()
        names = [part if rank == 0 else f"{part}.{rank:05d}" for part in taken.tensors]
        with ThreadPoolExecutor(len(names) or 1) as pool:
            stored = list(pool.map(self._put, taken.tensors.values(), taken.starts.values()))
        blobs = dict(collect(list(zip(names, stored, strict=True))))
        if rank > 0:
            return
        record = CheckpointRecord(taken.samples, self.attempt, taken.seconds, taken.laps, taken.journal, blobs)
        self.check()
        crash_point("checkpoint.before_record")
        create_record(self.store, f"{self.folder}{taken.samples:012d}-{self.attempt:04d}.json", record)
        crash_point("checkpoint.after_record")
        self._prune(taken.samples)

    def newest(self, at_most: int) -> int:
        """Returns the samples of the newest checkpoint up to ``at_most``, readable or not; 0 without a checkpoint."""
        return max((n for n in map(_samples, self.records()) if n <= at_most), default=0)

    def journal(self, at_most: int) -> tuple[int, MetricsJournal] | None:
        """Returns samples and journal of the newest checkpoint up to ``at_most``; None without a checkpoint."""
        for path in reversed(self.records()):
            if _samples(path) <= at_most and (record := peek_record(self.store, path, CheckpointRecord)):
                return record.samples, MetricsJournal.of(record.journal)
        return None

    def restore(self, state: TrainState, at_most: int) -> bool:
        """Loads the newest readable checkpoint of at most ``at_most`` samples into ``state``; False without one.

        A checkpoint that cannot be read is skipped with a warning for the one before it. It stays as it is, because
        another machine may be able to read it.
        """
        for path in reversed(self.records()):
            if _samples(path) > at_most:
                continue
            try:
                record = read_record(self.store, path, CheckpointRecord)
                if record is None:
                    continue
                saved = {part: self._read(record.blobs, part, like) for part, like in forms(state).items()}
            except CorruptObject as e:
                log.warning(
                    "checkpoint at sample %s is skipped, and the one before it is used: %s", f"{_samples(path):,}", e
                )
                continue
            put_back(state, saved)
            state.samples, state.seconds = record.samples, record.seconds
            state.phase_seconds = dict(record.laps)
            state.journal = MetricsJournal.of(record.journal)
            return True
        return False

    def check(self) -> None:
        """Raises Superseded if a later attempt has begun."""
        if self.trunk:
            self.trunk.check()
        newest = last_attempt(self.store, self.trajectory)
        if newest > self.attempt:
            raise Superseded(f"attempt {self.attempt} of this training stops: attempt {newest} has begun")

    def _put(self, tensors: Mapping[str, Tensor], starts: Mapping[str, int]) -> str:
        """Stores a blob that no other trajectory, artefact or earlier attempt shares, because its header names them.

        So where a damaged blob was skipped, the same state gets a sound one.
        """
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = {"trajectory": self.trajectory, "attempt": self.attempt, "starts": starts}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "tensors")
            save_tensors(plain, file, {"about": json.dumps(about, sort_keys=True)})
            return put_blob(self.store, file, move=True)

    def _read(self, blobs: Mapping[str, str], part: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns this worker's rows of the tensors of a part, which are ``like`` these. Raises as ``read_tensors``."""
        savers = sorted(name for name in blobs if name.partition(".")[0] == part)
        found = read_tensors(self.store, [blobs[name] for name in savers], like)
        # A parameter that nothing flowed through has no moments.
        if part != "optimizer" and found.keys() != like.keys():
            raise ValueError(f"checkpoint of another model: {part} lacks some of its tensors")
        return found

    def records(self) -> list[str]:
        """Returns the paths of records, readable or not, the oldest first."""
        before = self.trunk._own() if self.trunk else []
        return [*(path for path in before if _samples(path) <= self.fork), *self._own()]

    def _own(self) -> list[str]:
        paths = (entry.path for entry in self.store.list(self.folder))
        return sorted(path for path in paths if NAME.fullmatch(path.removeprefix(self.folder)))

    def _prune(self, samples: int) -> None:
        """Deletes all but the newest records of this and earlier attempts up to ``samples``, then unnamed blobs.

        Records of more samples were skipped as damaged, or belong to a longer training.
        """
        paths = self._own()
        own = [path for path in paths if _attempt(path) <= self.attempt and _samples(path) <= samples]
        old, kept = own[: -self.keep], [path for path in paths if path not in own[: -self.keep]]
        gone, needed = self._blobs(old), self._blobs(kept)
        self.store.delete(old)
        if None not in needed:  # what a damaged record names is not known
            self.store.delete(blob_path(blob) for blob in sorted(filter(None, gone - needed)) if self._is_own(blob))

    def _is_own(self, blob: str) -> bool:
        """Returns whether a blob is of a checkpoint of this trajectory: a record that was forged may name another."""
        path = blob_path(blob)
        try:
            size = int.from_bytes(self.store.read(path, 0, 8), "little")
            return read_about(self.store.read(path, 8, 8 + min(size, MOST_HEADER)))["trajectory"] == self.trajectory
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def _blobs(self, paths: list[str]) -> set[str | None]:
        """Returns the blobs that records name, and None if one of the records cannot be read."""
        records = [peek_record(self.store, path, CheckpointRecord) for path in paths]
        return {blob for record in records for blob in (record.blobs.values() if record else [None])}


def _samples(path: str) -> int:
    return int(path.rpartition("/")[2][:12])


def _attempt(path: str) -> int:
    return int(path.rpartition("-")[2].removesuffix(".json"))


def last_attempt(store: Store, trajectory: str) -> int:
    """Returns the highest attempt so far, 0 before the first."""
    prefix = f"checkpoints/{trajectory}/attempts/"
    names = (ATTEMPT.fullmatch(entry.path.removeprefix(prefix)) for entry in store.list(prefix))
    return max((int(name[1]) for name in names if name), default=0)


def take_attempt(store: Store, trajectory: str) -> int:
    """Returns the number of a new attempt, which no other process has."""
    while True:
        number = last_attempt(store, trajectory) + 1
        # Bytes of its own: where an answer is lost, a store looks whether the object is the one that was sent.
        if store.create(
            f"checkpoints/{trajectory}/attempts/{number:04d}.json", json.dumps({"by": uuid4().hex}).encode()
        ):
            return number


def open_checkpoints(ctx: Context, begin: bool) -> Checkpoints:
    """Returns the checkpoints of a training: to ``begin`` a new attempt that writes, or to read."""
    checkpoints: Checkpoints | None = None
    for key in dict.fromkeys([trunk_key(ctx), trajectory_key(ctx)]):
        attempt = take_attempt(ctx.store, key) if begin else 0
        checkpoints = Checkpoints(ctx.store, key, attempt, ctx.settings.keep_checkpoints, checkpoints, ctx.recipe.fork)
    assert checkpoints is not None
    return checkpoints
