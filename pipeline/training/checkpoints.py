"""Checkpoints: content-named tensors, and a record that is published last. The newest readable one wins.

A trajectory (a recipe without its stop) owns checkpoints/<trajectory>/. Every start of a training is an attempt with a
number of its own, taken by a conditional create; whoever sees a higher number stops.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load, save_file
from torch import Tensor

from pipeline.crash import crash_point
from pipeline.errors import CorruptObject
from pipeline.records import blob_path, create_record, put_blob, read_blob, read_record
from pipeline.store import Store
from pipeline.training.state import Journal, TrainState, optimizer_tensors, restore_optimizer

log = logging.getLogger("unclip")


class Superseded(Exception):
    """Another start of the same training has taken over; this one has nothing left to do."""


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
        blobs = {
            "model": self._put(state.model.state_dict()),
            "ema": self._put(state.ema.state_dict()),
            "optimizer": self._put(optimizer_tensors(state)),
        }
        body = {
            "samples": state.samples,
            "attempt": self.attempt,
            "seconds": state.seconds,
            "journal": asdict(state.journal),
            "blobs": blobs,
        }
        self.check()
        crash_point("checkpoint.before_record")
        create_record(self.store, f"{self.folder}{state.samples:012d}-{self.attempt:04d}.json", body)
        crash_point("checkpoint.after_record")
        self._prune()

    def newest(self, at_most: int) -> int:
        """Samples of the newest checkpoint of at most so many, read or not; 0 if there is none."""
        return max((n for n in map(_samples, self._paths()) if n <= at_most), default=0)

    def journal(self, at_most: int) -> tuple[int, Journal] | None:
        """Samples and journal of the newest checkpoint of at most so many; None if there is none."""
        for path in reversed(self._paths()):
            if _samples(path) <= at_most and (record := read_record(self.store, path)):
                return record["samples"], Journal(**record["journal"])
        return None

    def restore(self, state: TrainState, at_most: int) -> bool:
        """Load the newest readable checkpoint of at most so many samples into ``state``. False: there is none.

        One that cannot be read is deleted with a warning, and the one before it is tried.
        """
        for path in reversed(self._paths()):
            if _samples(path) > at_most:
                continue
            record = read_record(self.store, path)
            if record is None:
                continue
            try:
                tensors = {name: load(read_blob(self.store, blob)) for name, blob in record["blobs"].items()}
            except CorruptObject as e:
                log.warning("checkpoint at sample %s is dropped: %s", f"{record['samples']:,}", e)
                self.store.delete([path, e.path])
                continue
            state.model.load_state_dict(tensors["model"])
            state.ema.load_state_dict(tensors["ema"])
            restore_optimizer(state, tensors["optimizer"])
            state.samples, state.seconds = record["samples"], record["seconds"]
            state.journal = Journal(**record["journal"])
            return True
        return False

    def check(self) -> None:
        """Raise Superseded if a later attempt has begun."""
        newest = last_attempt(self.store, self.trajectory)
        if newest > self.attempt:
            raise Superseded(f"attempt {self.attempt} of this training stops: attempt {newest} has begun")

    def _put(self, tensors: dict[str, Tensor]) -> str:
        """A blob that no other trajectory and no artefact shares, because its header names this one."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "tensors")
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(plain, file, metadata={"trajectory": self.trajectory})
            return put_blob(self.store, file)

    def _paths(self) -> list[str]:
        """Paths of records, the oldest first."""
        paths = (entry.path for entry in self.store.list(self.folder))
        return sorted(path for path in paths if path.removeprefix(self.folder)[0].isdigit())

    def _prune(self) -> None:
        """Delete all but the newest of this and earlier attempts, then the blobs that no record names any more."""
        paths = self._paths()
        own = [path for path in paths if _attempt(path) <= self.attempt]
        old, kept = own[: -self.keep], [path for path in paths if path not in own[: -self.keep]]
        gone = self._blobs(old) - self._blobs(kept)
        self.store.delete(old)
        self.store.delete(blob_path(blob) for blob in sorted(gone))

    def _blobs(self, paths: list[str]) -> set[str]:
        records = (read_record(self.store, path) for path in paths)
        return {blob for record in records if record for blob in record["blobs"].values()}


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
