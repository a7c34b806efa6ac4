"""Checkpoints written beside the steps."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from pipeline.training.checkpoints import Course, Snapshot, snapshot
from pipeline.training.distributed.world import World
from pipeline.training.state import TrainState

LAST = 19  # the niceness that gives way to every other


class Saver:
    """Saves checkpoints in a thread of its own: a training waits for the copy of its tensors, not for the store, and
    that thread takes what the steps leave of the processor.

    One is written at a time, and the memory of its copy is kept for the next one. What goes wrong is raised by the next
    ``save`` or by ``wait``. As a context manager it waits at its end. Where a model is spread, every worker has one.
    """

    def __init__(self, course: Course, world: World):
        self.course, self.world = course, world
        self._collect = partial(world.collect, group=world.aside()) if world.sharded else list
        self._pool = ThreadPoolExecutor(1, "checkpoint", step_aside)
        self._last: Future[None] | None = None
        self._taken: Snapshot | None = None

    def save(self, state: TrainState) -> None:
        """Copy the state, and publish the copy. Raises Superseded if the save before found a later attempt."""
        self.wait()
        self._taken = snapshot(state, self.world.first, self._taken)
        publish = self.course.at(state.samples).publish
        self._last = self._pool.submit(publish, self._taken, self.world.rank, self._collect)

    def wait(self) -> None:
        """Until what was saved can be read. Raises Superseded."""
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


def step_aside() -> None:
    """Let this thread run when no other wants to: threads of a step wait for one another, so one that shares its core
    holds up all. Only Linux has a niceness for each thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST)
