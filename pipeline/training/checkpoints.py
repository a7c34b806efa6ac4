"""Checkpoints: content-named tensors, and a record that is published last. The newest readable one wins.

A trajectory (a recipe without its stop) owns checkpoints/<trajectory>/. Every start of a training is an attempt with a
number of its own, taken by a conditional create; whoever sees a higher number stops.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from models.tensors import save_tensors
from pipeline.errors import CorruptObject, Superseded
from pipeline.graph.damage import create_record
from pipeline.graph.stages import Context, trajectory_key, trunk_key
from pipeline.store import Store
from pipeline.store.crash import crash_point
from pipeline.store.records import blob_path, open_record, peek_record, put_blob, read_blob
from pipeline.training.distributed.sharding import first_row, is_spread, local
from pipeline.training.state import Journal, TrainState, forms, parts, put_back

Named = tuple[str, str]  # a part and its blob
log = logging.getLogger("unclip")


@dataclass(frozen=True)
class Snapshot:
    """What a worker has to save of a state, in the memory of the CPU: tensors by part and name, where the rows of those
    that are spread over workers begin, by part and name, and the rest of a checkpoint's record."""

    samples: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    starts: Mapping[str, Mapping[str, int]]
    body: Mapping[str, Any]


def snapshot(state: TrainState, first: bool = True, before: Snapshot | None = None) -> Snapshot:
    """A copy of what a checkpoint holds of this worker, which later steps do not change. What every worker has, the
    ``first`` one saves. ``before``: one that nobody needs any more; the copy takes over its memory, as fresh memory can
    cost more than the copying."""
    room = before.tensors if before else {}
    tensors: dict[str, dict[str, Tensor]] = {}
    starts: dict[str, dict[str, int]] = {}
    for part, values in parts(state).items():
        own = {name: tensor.detach() for name, tensor in values.items() if first or is_spread(tensor)}
        tensors[part] = {name: _copied(local(tensor), room.get(part, {}).get(name)) for name, tensor in own.items()}
        starts[part] = {name: first_row(tensor) for name, tensor in own.items() if is_spread(tensor)}
    journal = deepcopy(state.journal.as_json())
    body = {"samples": state.samples, "seconds": state.seconds, "laps": dict(state.laps), "journal": journal}
    return Snapshot(state.samples, tensors, starts, body)


def _copied(tensor: Tensor, room: Tensor | None) -> Tensor:
    """A copy in the memory of the CPU: in ``room``, if there is one that fits."""
    if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
        return tensor.to("cpu", copy=True)
    return room.copy_(tensor)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one trajectory, as one attempt sees them. ``keep`` of them stay."""

    store: Store
    trajectory: str
    attempt: int
    keep: int = 2

    @property
    def folder(self) -> str:
        return f"checkpoints/{self.trajectory}/"

    def save(self, state: TrainState) -> None:
        """Publish the state. Raises Superseded if a later attempt has begun."""
        self.publish(snapshot(state))

    def publish(self, taken: Snapshot, rank: int = 0, collect: Callable[[list[Named]], list[Named]] = list) -> None:
        """Publish a state as it was. Raises Superseded if a later attempt has begun.

        Where it is spread over workers, each puts what it has, ``collect`` brings the names together, and the first
        one publishes.
        """
        own = [
            (part if rank == 0 else f"{part}.{rank:05d}", self._put(tensors, taken.starts[part]))
            for part, tensors in taken.tensors.items()
        ]
        blobs = dict(collect(own))
        if rank > 0:
            return
        body = {**taken.body, "attempt": self.attempt, "blobs": blobs}
        self.check()
        crash_point("checkpoint.before_record")
        create_record(self.store, f"{self.folder}{taken.samples:012d}-{self.attempt:04d}.json", body)
        crash_point("checkpoint.after_record")
        self._prune(taken.samples)

    def save_failure(self, weights: Mapping[str, Tensor], samples: int, keys: Sequence[str]) -> None:
        """Keep the weights before the step after ``samples`` samples, which failed, and which rows had a hand in it."""
        body = {"samples": samples, "keys": list(keys), "blobs": {"model": self._put(weights, {})}}
        create_record(self.store, f"{self.folder}failures/{samples:012d}-{self.attempt:04d}.json", body)

    def last_failure(self) -> tuple[int, dict[str, Tensor]] | None:
        """Samples before the step that failed last, and the weights then; None if none has. Raises CorruptObject."""
        for path in sorted((e.path for e in self.store.list(f"{self.folder}failures/")), key=_attempt, reverse=True):
            if record := peek_record(self.store, path):
                return record["samples"], load(read_blob(self.store, record["blobs"]["model"]))
        return None

    def newest(self, at_most: int) -> int:
        """Samples of the newest checkpoint of at most so many, read or not; 0 if there is none."""
        return max((n for n in map(_samples, self._paths()) if n <= at_most), default=0)

    def journal(self, at_most: int) -> tuple[int, Journal] | None:
        """Samples and journal of the newest checkpoint of at most so many; None if there is none."""
        for path in reversed(self._paths()):
            if _samples(path) <= at_most and (record := peek_record(self.store, path)):
                return record["samples"], Journal(**record["journal"])
        return None

    def restore(self, state: TrainState, at_most: int) -> bool:
        """Loads the newest readable checkpoint of at most so many samples into ``state``. False: there is none.

        One that cannot be read is skipped with a warning, and the one before it is tried. It stays as it is, since
        another machine may be able to read it.
        """
        for path in reversed(self._paths()):
            if _samples(path) > at_most:
                continue
            try:
                record = open_record(self.store, path)
                if record is None:
                    continue
                saved = {part: self._read(record["blobs"], part, like) for part, like in forms(state).items()}
            except CorruptObject as e:
                log.warning("checkpoint at sample %s is skipped, for the one before it: %s", f"{_samples(path):,}", e)
                continue
            put_back(state, saved)
            state.samples, state.seconds = record["samples"], record["seconds"]
            state.laps = record.get("laps", {})  # older checkpoints have none
            state.journal = Journal(**record["journal"])
            return True
        return False

    def check(self) -> None:
        """Raise Superseded if a later attempt has begun."""
        newest = last_attempt(self.store, self.trajectory)
        if newest > self.attempt:
            raise Superseded(f"attempt {self.attempt} of this training stops: attempt {newest} has begun")

    def _put(self, tensors: Mapping[str, Tensor], starts: Mapping[str, int]) -> str:
        """Stores a blob that no other trajectory, no artefact and no earlier attempt shares.

        Its header names these. So where a damaged blob was skipped, the same state gets a sound one.
        """
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = json.dumps({"trajectory": self.trajectory, "attempt": self.attempt, "starts": starts}, sort_keys=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "tensors")
            save_tensors(plain, file, {"about": about})
            return put_blob(self.store, file, move=True)

    def _read(self, blobs: Mapping[str, str], part: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This worker's rows of tensors ``like`` these, by as many workers as they were saved. One blob is in memory
        at once. Raises CorruptObject, and ValueError where these are not the tensors of the part."""
        found: dict[str, Tensor] = {}
        missing: dict[str, int] = {}
        for name in sorted(name for name in blobs if name.partition(".")[0] == part):
            data = read_blob(self.store, blobs[name])
            starts = _about(data).get("starts", {})
            for tensor, piece in load(data).items():
                if tensor not in like or piece.shape[1:] != like[tensor].shape[1:]:
                    raise ValueError(f"checkpoint of another model: {part} {tensor} {list(piece.shape)}")
                if tensor not in found:
                    found[tensor] = torch.empty(local(like[tensor]).shape, dtype=piece.dtype)
                    missing[tensor] = found[tensor].numel()
                missing[tensor] -= _copy_rows(found[tensor], first_row(like[tensor]), piece, starts.get(tensor, 0))
        # A parameter that nothing flowed through has no moments.
        if any(missing.values()) or (part != "optimizer" and found.keys() != like.keys()):
            raise ValueError(f"checkpoint of another model: {part} has not all of its tensors")
        return found

    def _paths(self) -> list[str]:
        """Paths of records, the oldest first."""
        paths = (entry.path for entry in self.store.list(self.folder))
        return sorted(path for path in paths if path.removeprefix(self.folder)[0].isdigit())

    def _prune(self, samples: int) -> None:
        """Deletes all but the newest of this and earlier attempts up to so many samples, then the blobs that no record
        names any more. Those of more samples were skipped as damaged, or belong to a longer training."""
        paths = self._paths()
        own = [path for path in paths if _attempt(path) <= self.attempt and _samples(path) <= samples]
        old, kept = own[: -self.keep], [path for path in paths if path not in own[: -self.keep]]
        gone, needed = self._blobs(old), self._blobs(kept)
        self.store.delete(old)
        if None not in needed:  # what a damaged record names is not known
            self.store.delete(blob_path(blob) for blob in sorted(filter(None, gone - needed)))

    def _blobs(self, paths: list[str]) -> set[str | None]:
        """Returns the blobs that records name, and None if one of the records cannot be read."""
        records = [peek_record(self.store, path) for path in paths]
        return {blob for record in records for blob in (record["blobs"].values() if record else [None])}


def _about(data: bytes) -> dict[str, Any]:
    """What a file of tensors says of itself; older ones say nothing here."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"].get("about", "{}"))


def _copy_rows(target: Tensor, first: int, piece: Tensor, start: int) -> int:
    """Copy the rows that two stretches have in common, and say how many numbers these are. ``first`` and ``start``:
    the places of their first rows."""
    if not piece.ndim:
        target.copy_(piece)
        return 1
    low, high = max(first, start), min(first + len(target), start + len(piece))
    if low >= high:
        return 0
    rows = target[low - first : high - first]
    rows.copy_(piece[low - start : high - start])
    return rows.numel()


def _samples(path: str) -> int:
    return int(path.rpartition("/")[2][:12])


def _attempt(path: str) -> int:
    return int(path.rpartition("-")[2].removesuffix(".json"))


def last_attempt(store: Store, trajectory: str) -> int:
    """The highest attempt so far, 0 before the first."""
    prefix = f"checkpoints/{trajectory}/attempts/"
    names = (entry.path.removeprefix(prefix).removesuffix(".json") for entry in store.list(prefix))
    return max((int(name) for name in names if name.isdigit()), default=0)


def take_attempt(store: Store, trajectory: str) -> int:
    """The number of a new attempt, which nobody else has."""
    while True:
        number = last_attempt(store, trajectory) + 1
        if store.create(f"checkpoints/{trajectory}/attempts/{number:04d}.json", b"{}"):
            return number


@dataclass(frozen=True)
class Course:
    """The checkpoints on the way of one training: of the trunk up to ``fork`` samples, then of its own branch. Both
    are the same where the learning rate does not fall."""

    trunk: Checkpoints
    branch: Checkpoints
    fork: int

    def at(self, samples: int) -> Checkpoints:
        """Where a checkpoint after so many samples belongs."""
        return self.trunk if samples <= self.fork else self.branch

    def newest(self, at_most: int) -> int:
        """See Checkpoints.newest."""
        return max(self.branch.newest(at_most), self.trunk.newest(min(at_most, self.fork)))

    def journal(self, at_most: int) -> tuple[int, Journal] | None:
        """See Checkpoints.journal."""
        return self.branch.journal(at_most) or self.trunk.journal(min(at_most, self.fork))

    def restore(self, state: TrainState, at_most: int) -> bool:
        """See Checkpoints.restore."""
        return self.branch.restore(state, at_most) or self.trunk.restore(state, min(at_most, self.fork))


def course(ctx: Context, begin: bool) -> Course:
    """The checkpoints of a training: to write if it is to ``begin``, as a new attempt, or else to read."""
    keep = ctx.settings.keep_checkpoints
    keys = dict.fromkeys([trunk_key(ctx), trajectory_key(ctx)])
    made = [Checkpoints(ctx.store, key, take_attempt(ctx.store, key) if begin else 0, keep) for key in keys]
    return Course(made[0], made[-1], ctx.recipe.fork)
