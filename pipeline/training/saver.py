"""Says when a training is saved, and saves it in the background, as often as that costs it next to nothing."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from pipeline.settings import SPARED
from pipeline.training.checkpoints import Checkpoints, Snapshot, snapshot
from pipeline.training.distributed.process_group import CHECK_EVERY, ProcessGroup
from pipeline.training.state import TrainState


class Saver:
    """Writes checkpoints in a thread, so that a training waits for the copy of its tensors and not for the store.

    One is written at a time. An error is raised by the next ``due``, ``save`` or ``wait``; a context manager waits at
    its end. Where a model is sharded, every worker has a Saver.

    Args:
        checkpoints: Checkpoints of the training, which it writes.
        group: This worker's view of the others.
        every_s: Seconds between two saves, at least.
        saved: Samples of the checkpoint that the training went on from.
    """

    def __init__(self, checkpoints: Checkpoints, group: ProcessGroup, every_s: float = 0.0, saved: int = 0):
        self.checkpoints, self.group, self.every_s, self.saved = checkpoints, group, every_s, saved
        self.owed = False  # a validation pass is not saved yet: the report shows a running training by its checkpoints
        self._collect = partial(group.collect, group=group.side_group()) if group.sharded else list
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None
        self._began, self._took_s = time.monotonic(), 0.0

    def due(self, samples: int, step: int, validated: bool, last: bool) -> bool:
        """Returns whether to save after this many samples.

        That is after a validation pass and every ``every_s`` seconds, but not while a checkpoint is still being
        written, unless it is the ``last`` chance to save; with an interval of 0 after every step.
        """
        new = samples > self.saved
        self.owed = new and (self.owed or validated)
        if not new or last or self.every_s == 0:
            return new
        due = self.free() and (self.owed or self.late())
        if self.group.sharded:  # the clock of rank 0 counts, and asking it costs a collective
            return (validated or step % CHECK_EVERY == 0) and self.group.collect([due])[0]
        return due

    def free(self) -> bool:
        """Returns whether nothing is being written. Raises Superseded if the last save found a later attempt."""
        if self._last is not None and self._last.done():
            self.wait()
        return self._last is None

    def late(self) -> bool:
        """Returns whether the next save is due: after ``every_s``, and SPARED times as long as the last one took."""
        return time.monotonic() - self._began >= max(self.every_s, SPARED * self._took_s * (self.every_s > 0))

    def save(self, state: TrainState) -> None:
        """Copies the state and publishes the copy, after what is being written. Raises Superseded as ``free`` does."""
        self.wait()
        self._began = time.monotonic()
        taken = snapshot(state, self.group.is_rank_0)
        self._last = self._pool.submit(self._publish, taken)
        self.saved, self.owed = state.samples, False

    def _publish(self, taken: Snapshot) -> None:
        self.checkpoints.publish(taken, self.group.rank, self._collect)
        self._took_s = time.monotonic() - self._began

    def wait(self) -> None:
        """Waits until what was saved can be read. Raises Superseded."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()
