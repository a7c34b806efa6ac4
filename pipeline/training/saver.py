"""Saves a training in the background, and as often as that costs it next to nothing."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from pipeline.settings import SPARED
from pipeline.training.checkpoints import BranchedCheckpoints, Snapshot, snapshot
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.state import TrainState


class Saver:
    """Writes checkpoints in a thread, so that a training waits for the copy of its tensors and not for the store.

    One is written at a time. An error is raised by the next ``free``, ``save`` or ``wait``; a context manager waits at
    its end. Where a model is sharded, every worker has a Saver.

    Args:
        course: Checkpoints of the training, which it writes.
        group: This worker's view of the others.
        every_s: Seconds between two saves, at least.
    """

    def __init__(self, course: BranchedCheckpoints, group: ProcessGroup, every_s: float = 0.0):
        self.course, self.group, self.every_s = course, group, every_s
        self._collect = partial(group.collect, group=group.side_group()) if group.sharded else list
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None
        self._began, self._took_s = time.monotonic(), 0.0

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

    def _publish(self, taken: Snapshot) -> None:
        self.course.at(taken.samples).publish(taken, self.group.rank, self._collect)
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
