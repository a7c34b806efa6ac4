"""What makes shards in the processes of Ray Data, and what travels to and from them."""

from __future__ import annotations

import errno
import json
import pickle
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any

import pyarrow as pa

from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import Shard, ShardRow, publish_shard, read_shard
from pipeline.graph.local_ray import ray_logs
from pipeline.ledger import Ledger
from pipeline.progress import Steps, add
from pipeline.store import Store
from pipeline.store.parallel import in_order


@dataclass(frozen=True, slots=True)
class ShardTask:
    """Names a shard to make: its number and key, and the input shards that it is made from."""

    number: int
    key: str
    inputs: Mapping[str, ShardRow]


@dataclass(frozen=True)
class ShardOutput:
    """Holds what a worker made of one shard.

    Attributes:
        ledger: Ledger of its rows.
        blobs: Blobs by name; a large one may lie in a file.
        counts: Counts that are published with the shard.
        seconds: Seconds of the worker's steps, for people; not part of the shard.
        finished: Called when the shard is in the store.
    """

    ledger: Ledger
    blobs: Mapping[str, bytes | Path]
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    finished: Callable[[], object] = lambda: None


BINARY = pa.large_binary()  # whose values may have 2 GiB and more
DEATHS = 3  # of workers at one shard, whose nodes live; the next worker refuses it
LOST_NODES = 10  # as often workers may have gone with their nodes: a shard that takes its pods down ends some day, too
ShardWorker = Callable[[ShardTask], ShardOutput]
WorkTimes = dict[str, float]
"""Sums of what workers took: "busy_seconds" in tasks and "wait_seconds" between them, "written_bytes", and
"NAME_seconds" of each step. Steps of threads or helpers beside a worker are not part of its busy seconds."""
Timed = tuple[Any, Mapping[str, float]]
"""A result that can be pickled, and the seconds of the steps that it took."""


@dataclass(frozen=True)
class Streamed:
    """Makes shards in parts that are prepared on cores, worked on by workers, and joined.

    Where the settings name decoders, these are operators of one Ray Data stream, which holds the parts back that
    workers are not ready for. Its parts are large, because each costs Ray's driver some milliseconds. Elsewhere a
    worker does all of it, and prepares a part ahead on a thread. What is made must not depend on that.

    Attributes:
        parts: Returns how many parts a shard has, 1 or more.
        prepare: Prepares one part, by its number. Arrays of it are read-only in a stream.
        work: Called once in each worker; what it returns works on a part that was prepared.
        join: Makes the shard of what all its parts became, in order.
        alone: The same in smaller parts, for a worker that does all of it and has two of them in its memory.
    """

    parts: Callable[[ShardTask], int]
    prepare: Callable[[ShardTask, int], Timed]
    work: Callable[[], Callable[[ShardTask, int, Any], Timed]]
    join: Callable[[ShardTask, Sequence[Any]], ShardOutput]
    alone: Streamed | None = None

    def __call__(self) -> ShardWorker:
        """Returns a worker that does all of it."""
        if self.alone:
            return self.alone()
        work, thread = self.work(), ThreadPoolExecutor(1)

        def make(task: ShardTask) -> ShardOutput:
            steps, made = Steps(), []
            parts = range(self.parts(task))
            prepared = in_order(partial(thread.submit, self.prepare, task), parts, 1)  # type: ignore[call-arg]
            for part, (value, took) in zip(parts, steps.each("views", prepared), strict=True):
                result, seconds = work(task, part, value)
                made.append(result)
                for more in (took, seconds):
                    add(steps.seconds, more)
            output = self.join(task, made)
            add(steps.seconds, output.seconds)
            return replace(output, seconds=steps.seconds)

        return make


class WorkerClock:
    """Divides a worker's time into that in which it has shards under way and that in which it waits for one.

    Any thread may call it.
    """

    def __init__(self) -> None:
        self._lock, self._since, self._under_way = Lock(), time.monotonic(), 0
        self._passed: WorkTimes = {"busy_seconds": 0.0, "wait_seconds": 0.0}

    @contextmanager
    def at_work(self, work: WorkTimes) -> Iterator[None]:
        """Counts a block as work, and adds to ``work`` at its end what has passed and was not added before."""
        self._count(1)
        try:
            yield
        finally:
            add(work, self._count(-1))

    def _count(self, change: int) -> WorkTimes:
        with self._lock:
            now = time.monotonic()
            add(self._passed, {"busy_seconds" if self._under_way else "wait_seconds": now - self._since})
            self._since, self._under_way, passed = now, self._under_way + change, self._passed
            if change < 0:
                self._passed = dict.fromkeys(passed, 0.0)
            return passed


def make_shard(
    store: Store,
    stage: str,
    worker: ShardWorker,
    task: ShardTask,
    clock: WorkerClock,
    making: Callable[[ShardTask], AbstractContextManager[None]] = lambda task: nullcontext(),
) -> tuple[Shard, WorkTimes]:
    """Makes one shard, unless another driver has made it. ``clock`` is that of the worker."""
    work: WorkTimes = {"write_seconds": 0.0, "written_bytes": 0}
    with clock.at_work(work):
        shard = read_shard(store, stage, task.key)
        if shard is None:
            with making(task):
                output = worker(task)
                made = time.monotonic()
                sizes = [blob.stat().st_size if isinstance(blob, Path) else len(blob) for blob in output.blobs.values()]
                inputs = {name: each.key for name, each in task.inputs.items()}
                made_of = output.ledger, output.blobs, output.counts, inputs
                shard = publish_shard(store, stage, task.number, task.key, *made_of)
                output.finished()
            work |= {f"{name}_seconds": seconds for name, seconds in output.seconds.items()}
            work["write_seconds"] = time.monotonic() - made
            work["written_bytes"] = sum(sizes)
    return shard, work


class Places:
    """Lets a worker make ``count`` shards at once, or one that may kill it alone: the others would share the blame."""

    def __init__(self, count: int):
        self._count, self._free, self._next = count, Semaphore(count), Lock()

    @contextmanager
    def take(self, alone: bool) -> Iterator[None]:
        """Waits for a place and holds it, or for all of them."""
        taken = self._count if alone else 1
        # One at a time: two that each held some of the places and waited for all of them would wait for ever.
        with self._next:
            for _ in range(taken):
                self._free.acquire()
        try:
            yield
        finally:
            self._free.release(taken)


@contextmanager
def _counting_deaths(stage: str, task: ShardTask, step: str = "", places: Places | None = None) -> Iterator[None]:
    """Raises UserError if DEATHS workers of this driver died in this block, or LOST_NODES went with their nodes.

    Ray replaces a worker that dies, for ever, and gives it the same shard. Its own limits count the tasks that wait
    behind such a shard, too, and do not say which one it was. A node that was taken back does not count against the
    shard.
    """
    import ray

    # The key-value store of the head, for which Ray has no public name: an actor would count in one more process, and
    # forget with the node that it is on.
    from ray.experimental import internal_kv

    context = ray.get_runtime_context()
    name = f"unclip {context.get_job_id()} {stage} {task.key}{step}"
    died_on: list[str] = json.loads(internal_kv._internal_kv_get(name) or "[]")  # nodes
    living = {node["NodeID"] for node in ray.nodes() if node["Alive"]} if died_on else set()
    deaths = sum(node in living for node in died_on)
    # One node that went took all that was on it along. A second may have had too little memory for several shards.
    suspect = deaths > 0 or len(died_on) > 1
    with places.take(alone=suspect) if places else nullcontext():
        internal_kv._internal_kv_put(name, json.dumps([*died_on, context.get_node_id()]), overwrite=True)
        try:
            if deaths >= DEATHS or len(died_on) >= LOST_NODES:
                rows = max((shard.kept + shard.lost for shard in task.inputs.values()), default=0)
                raise UserError(
                    f"{stage}: shard {task.number} ({rows:,} rows, whose keys begin with {task.number:08d}) killed "
                    f"{len(died_on)} workers; see Ray's log, most likely they ran out of memory: give them more "
                    f"(run.{stage}.memory_mb) or lower source.shard_rows, and run the same command again"
                )
            yield
        finally:  # what dies does not come here
            internal_kv._internal_kv_del(name)


@dataclass
class Part:
    """A part of a shard on its way through operators: what it became until now, or why it cannot be made."""

    task: ShardTask
    number: int = 0
    made: Any = None
    failure: UserError | CorruptObject | None = None
    work: WorkTimes = field(default_factory=dict)


def pack_part(part: Part, apart: bool = False) -> pa.Table:
    """Returns a part as a row of a block. ``apart`` leaves its arrays out of the pickle, as columns of their own.

    They are not copied then, but once into Ray's object store, where the next operator reads them.
    """
    arrays: list[pickle.PickleBuffer] = []
    columns = {"part": pa.array([pickle.dumps(part, 5, buffer_callback=arrays.append if apart else None)], BINARY)}
    for number, array in enumerate(arrays):
        data = pa.py_buffer(array.raw())
        ends = pa.py_buffer(struct.pack("=2q", 0, data.size))
        columns[f"array {number}"] = pa.LargeBinaryArray.from_buffers(BINARY, 1, [None, ends, data])
    return pa.table(columns)


def unpack_part(block: pa.Table) -> Part:
    """Returns the part that ``pack_part`` made a block of."""
    data, *arrays = block.columns
    # Not as a scalar, of which Arrow makes a copy. What is empty may have no buffer.
    return pickle.loads(data[0].as_py(), buffers=[array.chunk(0).buffers()[2] or b"" for array in arrays])


def _expected(stage: str, error: Exception) -> UserError | CorruptObject:
    """Returns what of an error is told in one line at the driver. Raises the error where it is not expected."""
    if isinstance(error, UserError | CorruptObject):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f"{tempfile.gettempdir()} of {socket.gethostname()}"
        return UserError(f"{stage}: the disk of {place} is full (TMPDIR); free space and run the same command again")
    raise error


def _opened(stage: str, open_it: Callable[[], Any]) -> tuple[Any, UserError | CorruptObject | None]:
    """Returns what a worker works with, or why it cannot: Ray would report an error here as a process that died."""
    try:
        return open_it(), None
    except Exception as e:
        return None, _expected(stage, e)


def step(
    stage: str, parts: Callable[[ShardTask], int], open_work: Callable[[], Callable[..., Timed]], of_workers: bool
) -> type:
    """Returns a class for Ray Data that puts parts through one step of a stream.

    With ``of_workers`` its time counts as worker time; without, what it makes of a part is packed for such a step.
    Expected errors are returned with the part.
    """

    class Step:
        def __init__(self) -> None:
            self.work, self.failure = _opened(stage, open_work)
            self.free = time.monotonic()

        def __call__(self, block: pa.Table) -> pa.Table:
            part = unpack_part(block)
            part.failure = part.failure or self.failure
            if part.failure is None and part.number < parts(part.task):
                try:
                    self.put_through(part)
                except Exception as e:
                    part.failure = _expected(stage, e)
            return pack_part(part, apart=not of_workers)

        def put_through(self, part: Part) -> None:
            began = time.monotonic()
            given = () if part.made is None else (part.made,)
            with _counting_deaths(stage, part.task, f" {part.number} {of_workers}"):
                part.made, seconds = self.work(part.task, part.number, *given)
            add(part.work, {f"{name}_seconds": value for name, value in seconds.items()})
            if of_workers:
                add(part.work, {"wait_seconds": began - self.free, "busy_seconds": time.monotonic() - began})
            self.free = time.monotonic()

    return Step


def publisher(
    store: Store,
    stage: str,
    open_join: Callable[[], Callable[[ShardTask, Sequence[Any]], ShardOutput]],
    alone: bool,
    at_once: int = 1,
) -> type:
    """Returns a class for Ray Data that makes a shard of what its parts became, and publishes it.

    ``alone``: there is no operator before it, and its time is that of workers. ``at_once``: threads that call it.
    Expected errors travel back as values, not as tracebacks.
    """

    class Publisher:
        def __init__(self) -> None:
            self.join, self.failure = _opened(stage, open_join)
            self.count = _counters(stage)
            self.clock, self.places = WorkerClock(), Places(at_once)

        def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
            try:
                made: Any = self.publish([pickle.loads(data) for data in batch["part"]])
            except Exception as e:
                made = _expected(stage, e)
            return {"answer": [pickle.dumps(made)]}

        def publish(self, parts: Sequence[Part]) -> tuple[Shard, WorkTimes]:
            task = parts[0].task
            if [(part.task.key, part.number) for part in parts] != [(task.key, i) for i in range(len(parts))]:
                raise RuntimeError(f"{stage}: Ray Data mixed the parts of shard {task.number} with others")
            for failure in (self.failure, *(part.failure for part in parts)):
                if failure is not None:
                    raise failure
            made = [part.made for part in parts if part.made is not None]
            making = partial(_counting_deaths, stage, places=self.places)
            shard, work = make_shard(store, stage, lambda task: self.join(task, made), task, self.clock, making)
            if not alone:
                work |= {"wait_seconds": 0.0, "busy_seconds": 0.0}
            for part in parts:
                add(work, part.work)
            self.count(shard, work)
            return shard, work

    return Publisher


def read_answer(data: bytes) -> tuple[Shard, WorkTimes]:
    """Returns the shard that an operator's answer holds, and what it took, or raises what was in its way."""
    answer = pickle.loads(data)
    if isinstance(answer, Exception):
        ray_logs()  # stay, since it may speak of them
        raise answer
    return answer


def _counters(stage: str) -> Callable[[Shard, WorkTimes], None]:
    """Returns what adds a worker's work to Ray's own metrics, where the cluster is scraped."""
    from ray.util import metrics

    rows = metrics.Counter("unclip_rows", "Rows by outcome.", ("stage", "end"))
    seconds = metrics.Counter("unclip_worker_seconds", "Seconds of workers, by step.", ("stage", "step"))
    written = metrics.Counter("unclip_written_bytes", "Bytes of blobs published.", ("stage",))

    def count(shard: Shard, work: WorkTimes) -> None:
        ends = {"kept": shard.ledger.kept, **shard.ledger.lost}
        for end, number in ends.items():
            if number:  # a counter takes no zero
                rows.inc(number, {"stage": stage, "end": end})
        for step, value in work.items():
            if step.endswith("_seconds") and value > 0:
                seconds.inc(value, {"stage": stage, "step": step.removesuffix("_seconds")})
        if work["written_bytes"]:
            written.inc(work["written_bytes"], {"stage": stage})

    return count
