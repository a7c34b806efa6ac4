"""Makes one shard for every task, on workers of Ray Data. Only this module uses Ray Data.

Progress is the shard records in the store, never anything of Ray's: what has a record is not done again.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import (
    Artifact,
    Shard,
    ShardRow,
    publish_artifact,
    publish_shard,
    read_shard,
    shard_path,
    write_shard_table,
)
from pipeline.graph.ray import start_ray, wait_for_room
from pipeline.graph.resources import Team
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.progress import Progress, add
from pipeline.store import Store
from pipeline.store.parallel import ordered_map


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
        ledger: Counts its rows.
        blobs: By name; a large blob may lie in a file.
        counts: Published with the shard.
        seconds: Of the worker's steps, for people; not part of the shard.
        finished: Called when the shard is in the store.
    """

    ledger: Ledger
    blobs: Mapping[str, bytes | Path]
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    finished: Callable[[], object] = lambda: None


DEATHS = 3  # of workers at one shard; the next worker refuses it
ShardWorker = Callable[[ShardTask], ShardOutput]
WorkTimes = dict[str, float]
"""Sums of what workers took: "busy_seconds" in tasks and "wait_seconds" between them, "written_bytes", and
"NAME_seconds" of each step. Steps of threads or helpers beside a worker are not part of its busy seconds."""


def map_shards(
    ctx: Context,
    tasks: Sequence[ShardTask],
    make_worker: Callable[[], ShardWorker],
    unit: str = "rows",
    rows: int = 0,
) -> Artifact:
    """Makes every shard without a record as ``run_shards`` does, then publishes the artefact that lists them all."""
    began = time.monotonic()
    shards, made = run_shards(ctx, tasks, make_worker, unit, rows)
    blob, ledger = write_shard_table(ctx.store, shards)
    metrics, times = {"shards": len(tasks)}, {"shards_made": made}
    artifact = ctx.publishable(shard_table=blob, ledger=ledger, metrics=metrics, times=times)
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)


def run_shards(
    ctx: Context,
    tasks: Sequence[ShardTask],
    make_worker: Callable[[], ShardWorker],
    unit: str,
    amount: int,
    title: str | None = None,
) -> tuple[list[Shard], int]:
    """Makes every shard without a record. With ``ctx.settings.workers`` 0 the worker runs in this process, without Ray.

    Args:
        ctx: Of the stage.
        tasks: One for each shard.
        make_worker: Pickled, and called once in every worker process.
        unit: Of the progress line.
        amount: The units of all tasks, as ledgers count them, for the progress line.
        title: Of the progress line; the stage by default.

    Returns:
        All shards by rising number, and how many were made now.
    """
    found = list(_each_shard(ctx, tasks, make_worker, unit, amount, title or ctx.stage))
    return sorted((shard for shard, _ in found), key=lambda shard: shard.number), sum(new for _, new in found)


def _each_shard(
    ctx: Context,
    tasks: Sequence[ShardTask],
    make_worker: Callable[[], ShardWorker],
    unit: str,
    amount: int,
    title: str,
) -> Iterator[tuple[Shard, bool]]:
    """Yields every shard, in no order, and whether it was made now.

    A listing decides what is made first. Existing records are read last; a corrupt one is made again. What the workers
    took is added to ``ctx.work``: summed over the passes of a stage, with the most workers and rows of a pass.
    """
    work = WorkTimes()
    paths = {shard_path(ctx.stage, task.key) for task in tasks}
    there = {entry.path for entry in ctx.store.list(f"shards/{ctx.stage}/") if entry.path in paths}
    todo = [task for task in tasks if shard_path(ctx.stage, task.key) not in there]
    done = [task for task in tasks if shard_path(ctx.stage, task.key) in there]
    guess = amount * len(done) // max(1, len(tasks))
    with Progress(title, amount, unit, start=guess) as progress:
        failed = Counter[str]()

        def make(todo: Sequence[ShardTask]) -> Iterator[tuple[Shard, bool]]:
            team = _team(ctx, len(todo))
            work["workers"] = max(work.get("workers", 1), team.count if team else 1)
            for shard, took in _run(ctx, todo, make_worker, team):
                add(work, {**took, "made_rows": shard.ledger.rows})
                work["made_seconds"] = progress.seconds
                failed.update({**shard.ledger.rejected, **shard.ledger.deferred})
                progress.advance(shard.ledger.rows, partial(_note, work, failed))
                yield shard, True

        yield from make(todo)
        lost, rows = [], 0
        found = ordered_map(lambda task: read_shard(ctx.store, ctx.stage, task.key), done)
        for task, read in zip(done, found, strict=True):
            if read is None:
                lost.append(task)
            else:
                rows += read.ledger.rows
                yield read, False
        progress.first += rows - guess
        progress.done += rows - guess
        yield from make(lost)
    most = {name: max(work.get(name, 0), ctx.work.get(name, 0)) for name in ("workers", "made_rows")}
    add(ctx.work, work)
    ctx.work.update(most)


def _note(work: WorkTimes, lost: Counter[str]) -> str:
    """Returns such as '2 workers 93% busy, 1.2 MB/s written, lost 12 http_4xx, 3 timeout'."""
    seconds = work["made_seconds"]
    busy, rate = work["busy_seconds"] / seconds / work["workers"], work["written_bytes"] / seconds / 1e6
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.most_common(2))
    who = "1 worker" if work["workers"] == 1 else f"{work['workers']} workers"
    note = f"{who} {busy:.0%} busy, {rate:.1f} MB/s written"
    return f"{note}, lost {reasons}" if reasons else note


def _team(ctx: Context, tasks: int) -> Team | None:
    """Returns Ray's workers for this many tasks; None where nothing is left to do, or this process does it."""
    if not tasks or ctx.settings.workers == 0:
        return None
    settings = ctx.config.run.ray
    return wait_for_room(start_ray(settings), ctx.stage, ctx.settings, settings, tasks)


def _run(
    ctx: Context, todo: Sequence[ShardTask], make_worker: Callable[[], ShardWorker], team: Team | None
) -> Iterator[tuple[Shard, WorkTimes]]:
    if not todo:
        return
    if team is None:
        worker = make_worker()
        free = time.monotonic()
        for task in todo:
            shard, work = _make(ctx.store, ctx.stage, worker, task, free)
            free = time.monotonic()
            yield shard, work
        return
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        # Ray's own, to the console; its log file and other handlers keep everything.
        if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith("ray."):
            handler.setLevel(logging.ERROR)
    dataset = ray.data.from_items(
        [{"task": pickle.dumps(task)} for task in todo], override_num_blocks=len(todo)
    ).map_batches(
        _actor(ctx.store, ctx.stage, make_worker),
        batch_size=1,
        num_cpus=team.worker.cpus,
        num_gpus=team.worker.gpus,
        memory=team.worker.memory or None,
        label_selector=dict(team.worker.labels),
        compute=ray.data.ActorPoolStrategy(size=team.count),
    )
    for row in dataset.iter_rows():
        yield _answer(row["answer"])


def _make(
    store: Store,
    stage: str,
    worker: ShardWorker,
    task: ShardTask,
    free: float,
    making: Callable[[str, ShardTask], AbstractContextManager[None]] = lambda stage, task: nullcontext(),
) -> tuple[Shard, WorkTimes]:
    """Makes one shard, unless another driver has made it. The worker has been idle since ``free``."""
    began = time.monotonic()
    work: WorkTimes = {"wait_seconds": began - free, "write_seconds": 0.0, "written_bytes": 0}
    shard = read_shard(store, stage, task.key)
    if shard is None:
        with making(stage, task):
            output = worker(task)
            made = time.monotonic()
            sizes = [blob.stat().st_size if isinstance(blob, Path) else len(blob) for blob in output.blobs.values()]
            shard = publish_shard(store, stage, task.number, task.key, output.ledger, output.blobs, output.counts)
            output.finished()
        work |= {f"{name}_seconds": seconds for name, seconds in output.seconds.items()}
        work["write_seconds"] = time.monotonic() - made
        work["written_bytes"] = sum(sizes)
    work["busy_seconds"] = time.monotonic() - began
    return shard, work


@contextmanager
def _counting_deaths(stage: str, task: ShardTask) -> Iterator[None]:
    """Raises UserError if DEATHS workers of this driver died in this block.

    Ray replaces a worker that dies, for ever, and gives it the same shard. Its own limits count the tasks that wait
    behind such a shard, too, and do not say which one it was.
    """
    import ray
    from ray.experimental import internal_kv

    name = f"unclip {ray.get_runtime_context().get_job_id()} {stage} {task.key}"
    begun = int(internal_kv._internal_kv_get(name) or 0)
    internal_kv._internal_kv_put(name, str(begun + 1), overwrite=True)
    try:
        if begun == DEATHS:
            rows = max((shard.kept + shard.lost for shard in task.inputs.values()), default=0)
            raise UserError(
                f"{stage}: shard {task.number} ({rows:,} rows, whose keys begin with {task.number:08d}) killed {begun} "
                f"workers; Ray's log says how, most often for want of memory: give them more (run.{stage}.memory_mb) "
                f"or make shards smaller (source.shard_rows), and run the same command again"
            )
        yield
    finally:  # what dies does not come here
        internal_kv._internal_kv_del(name)


def _actor(store: Store, stage: str, make_worker: Callable[[], ShardWorker]) -> type:
    """Returns a class for Ray Data around a worker. Expected errors travel back as values, not as tracebacks."""

    class ShardActor:
        def __init__(self) -> None:
            self.worker = make_worker()
            self.count = _counters(stage)
            self.free = time.monotonic()

        def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
            return {"answer": [self.answer(pickle.loads(task)) for task in batch["task"]]}

        def answer(self, task: ShardTask) -> bytes:
            try:
                shard, work = _make(store, stage, self.worker, task, self.free, _counting_deaths)
            except (UserError, CorruptObject) as e:
                return pickle.dumps(e)
            self.count(shard, work)
            self.free = time.monotonic()
            return pickle.dumps((shard, work))

    return ShardActor


def _answer(answer: bytes) -> tuple[Shard, WorkTimes]:
    found = pickle.loads(answer)
    if isinstance(found, Exception):
        raise found
    return found


def _counters(stage: str) -> Callable[[Shard, WorkTimes], None]:
    """Returns what adds a worker's work to Ray's own metrics, where the cluster is scraped."""
    from ray.util import metrics

    rows = metrics.Counter("unclip_rows", "Rows by how they ended.", ("stage", "end"))
    seconds = metrics.Counter("unclip_worker_seconds", "Seconds of workers, by what they went into.", ("stage", "step"))
    written = metrics.Counter("unclip_written_bytes", "Bytes of blobs published.", ("stage",))

    def count(shard: Shard, work: WorkTimes) -> None:
        ends = {"kept": shard.ledger.kept, **shard.ledger.rejected, **shard.ledger.deferred}
        for end, number in ends.items():
            if number:  # a counter takes no zero
                rows.inc(number, {"stage": stage, "end": end})
        for step, value in work.items():
            if step.endswith("_seconds") and value > 0:
                seconds.inc(value, {"stage": stage, "step": step.removesuffix("_seconds")})
        if work["written_bytes"]:
            written.inc(work["written_bytes"], {"stage": stage})

    return count


class Helpers:
    """Calls ``work`` for one worker, in turn in Ray actors of one core each, on nodes with these labels.

    Actors end with the process that made them. Ray replaces a lost actor and repeats its calls.
    """

    def __init__(self, work: Callable[..., Any], size: int, nodes: Mapping[str, str]):
        import ray

        options: dict[str, Any] = {"num_cpus": 1, "label_selector": dict(nodes)}
        actor: Any = ray.remote(**options, max_restarts=-1, max_task_retries=-1)(_Helper)
        self._turns = cycle([actor.remote(work) for _ in range(size)])

    def submit(self, *arguments: Any) -> Future[Any]:
        """Submits as ``Executor.submit`` does, without the function."""
        return next(self._turns).call.remote(*arguments).future()


class _Helper:
    def __init__(self, work: Callable[..., Any]):
        self.work = work

    def call(self, *arguments: Any) -> Any:
        return self.work(*arguments)
