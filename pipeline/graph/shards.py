"""Makes one shard for every task, on workers of Ray Data (see ``workers``). Only this module uses Ray Data.

Progress is the shard records in the store, never anything of Ray's: what has a record is not done again.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from pipeline.graph.artifacts import (
    Artifact,
    Shard,
    publish_artifact,
    read_shard,
    shard_path,
    write_shard_table,
)
from pipeline.graph.ray import start_ray, wait_for_room
from pipeline.graph.resources import Resources, WorkerGroup
from pipeline.graph.stages import Context
from pipeline.graph.workers import (
    Part,
    ShardOutput,
    ShardTask,
    ShardWorker,
    Streamed,
    WorkerClock,
    WorkTimes,
    make_shard,
    pack_part,
    publisher,
    read_answer,
    step,
)
from pipeline.progress import Progress, add
from pipeline.store.parallel import ordered_map

T = TypeVar("T")


def map_shards(
    ctx: Context,
    tasks: Sequence[ShardTask],
    make_worker: Callable[[], ShardWorker],
    unit: str = "rows",
    rows: int = 0,
    measure: Callable[[Sequence[Shard]], Mapping[str, Any]] = lambda shards: {},
    at_once: int = 1,
    blobs: Mapping[str, str] = MappingProxyType({}),
) -> Artifact:
    """Makes every shard without a record as ``run_shards`` does, then publishes the artefact that lists them all.

    Its metrics are their number and what ``measure`` says of them; ``blobs`` are those that no shard has.
    """
    began = time.monotonic()
    shards, made = run_shards(ctx, tasks, make_worker, unit, rows, at_once=at_once)
    blob, ledger = write_shard_table(ctx.store, shards)
    metrics, times = {"shards": len(tasks), **measure(shards)}, {"shards_made": made}
    environment = {"device": "cuda"} if ctx.work.get("gpus") else {}
    artifact = ctx.publishable(
        shard_table=blob, ledger=ledger, blobs=dict(blobs), metrics=metrics, times=times, environment=environment
    )
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)


def run_shards(
    ctx: Context,
    tasks: Sequence[ShardTask],
    make_worker: Callable[[], ShardWorker],
    unit: str,
    amount: int,
    title: str | None = None,
    at_once: int = 1,
) -> tuple[list[Shard], int]:
    """Makes every shard without a record. With ``ctx.settings.workers`` 0 the worker runs in this process, without Ray.

    A listing decides what is made first. Existing records are read last; one that has gone meanwhile is made again.
    What the workers took is added to ``ctx.work``: summed over the passes of a stage, with the most workers and rows of
    a pass.

    Args:
        ctx: Context of the stage.
        tasks: Tasks, one for each shard.
        make_worker: Pickled, and called once in every worker process.
        unit: Unit of the progress line.
        amount: The units of all tasks, as ledgers count them, for the progress line.
        title: Title of the progress line; the stage by default.
        at_once: Shards that a worker of Ray has under way, each on a thread of its own.

    Returns:
        All shards by rising number, and how many were made now.
    """
    work = WorkTimes()
    paths = {shard_path(ctx.stage, task.key) for task in tasks}
    there = {entry.path for entry in ctx.store.list(f"shards/{ctx.stage}/") if entry.path in paths}
    todo = [task for task in tasks if shard_path(ctx.stage, task.key) not in there]
    done = [task for task in tasks if shard_path(ctx.stage, task.key) in there]
    guess = amount * len(done) // max(1, len(tasks))
    made: list[Shard] = []
    with Progress(title or ctx.stage, amount, unit, start=guess) as progress:
        failed = Counter[str]()

        def make(todo: Sequence[ShardTask]) -> None:
            team = _team(ctx, len(todo))
            work["workers"] = max(work.get("workers", 1), team.count if team else 1)
            work["gpus"] = max(work.get("gpus", 0), _gpus_each(ctx, team))
            for shard, took in _run(ctx, todo, make_worker, team, at_once):
                add(work, {**took, "made_rows": shard.ledger.rows})
                work["made_seconds"] = progress.seconds
                failed.update(shard.ledger.lost)
                progress.advance(shard.ledger.rows, partial(_note, work, failed))
                made.append(shard)

        make(todo)
        read = list(ordered_map(lambda task: read_shard(ctx.store, ctx.stage, task.key), done))
        found = [shard for shard in read if shard is not None]
        rows = sum(shard.ledger.rows for shard in found)
        progress.correct(rows - guess)
        make([task for task, shard in zip(done, read, strict=True) if shard is None])
    most = {name: max(work.get(name, 0), ctx.work.get(name, 0)) for name in ("workers", "gpus", "made_rows")}
    add(ctx.work, work)
    ctx.work.update(most)
    return sorted([*made, *found], key=lambda shard: shard.number), len(made)


def _note(work: WorkTimes, lost: Counter[str]) -> str:
    """Returns such as '2 workers 93% busy, 1.2 MB/s written, lost 12 http_4xx, 3 timeout'."""
    seconds = work["made_seconds"]
    busy, rate = work["busy_seconds"] / seconds / work["workers"], work["written_bytes"] / seconds / 1e6
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.most_common(2))
    who = "1 worker" if work["workers"] == 1 else f"{work['workers']} workers"
    note = f"{who} {busy:.0%} busy, {rate:.1f} MB/s written"
    return f"{note}, lost {reasons}" if reasons else note


def _team(ctx: Context, tasks: int) -> WorkerGroup | None:
    """Returns Ray's workers for this many tasks; None where nothing is left to do, or this process does it."""
    if not tasks or ctx.settings.workers == 0:
        return None
    settings = ctx.ray
    return wait_for_room(start_ray(settings), ctx.stage, ctx.settings, settings, tasks)


def _gpus_each(ctx: Context, team: WorkerGroup | None) -> float:
    """Returns how many GPUs each worker takes; without a team, this process, which takes one by itself."""
    asked = team.worker.gpus if team else getattr(ctx.settings, "gpus", 0)
    if asked == "auto":
        import torch

        return float(torch.cuda.is_available())
    return asked if isinstance(asked, int | float) else 0


def _run(
    ctx: Context,
    todo: Sequence[ShardTask],
    make_worker: Callable[[], ShardWorker],
    team: WorkerGroup | None,
    at_once: int,
) -> Iterator[tuple[Shard, WorkTimes]]:
    if not todo:
        return
    if team is None:
        worker, clock = make_worker(), WorkerClock()
        for task in todo:
            yield make_shard(ctx.store, ctx.stage, worker, task, clock)
        return
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        # Ray's own, to the console; its log file and other handlers keep everything.
        if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith("ray."):
            handler.setLevel(logging.ERROR)
    if team.helpers and isinstance(make_worker, Streamed):
        dataset = _stream(ctx, todo, make_worker, team)
    else:
        make = publisher(
            ctx.store, ctx.stage, partial(_alone, make_worker, team.worker.gpus), alone=True, at_once=at_once
        )
        dataset = _parts(todo, 1).map_batches(make, batch_size=1, **_pool(team.worker, team.count, at_once))
    for row in dataset.iter_rows():
        yield read_answer(row["answer"])


def _alone(make_worker: Callable[[], ShardWorker], gpus: float) -> Callable[[ShardTask, Sequence[Any]], ShardOutput]:
    worker = _with_own_gpus(make_worker, gpus)
    return lambda task, made: worker(task)


def _with_own_gpus(open_it: Callable[[], T], gpus: float) -> T:
    """Opens what a worker works with, where torch sees no other GPUs than those that Ray gave the worker.

    One that has none would see all of its machine, which Ray may have been told not to use.
    """
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return open_it()


def _parts(todo: Sequence[ShardTask], count: int) -> Any:
    """Returns a dataset of ``count`` parts of each shard, each a block of its own."""
    import ray.data

    return ray.data.from_arrow([pack_part(Part(task, number)) for task in todo for number in range(count)])


def _pool(share: Resources, size: int, at_once: int = 1) -> dict[str, Any]:
    """Returns the options of an operator that begins with ``size`` processes, and gives back those it cannot use.

    Each makes ``at_once`` shards at once.
    """
    from ray.data import ActorPoolStrategy

    threads: dict[str, Any] = {}
    if at_once > 1:
        threads = {"enable_true_multi_threading": True, "max_concurrent_calls_per_actor": at_once}
        threads |= {"max_tasks_in_flight_per_actor": at_once + 1}  # not more: another worker may be free sooner
    return {
        "num_cpus": share.cpus,
        "num_gpus": share.gpus,
        "memory": share.memory or None,
        "label_selector": dict(share.labels),
        "compute": ActorPoolStrategy(min_size=1, max_size=size, initial_size=size, **threads),
    }


def _stream(ctx: Context, todo: Sequence[ShardTask], make: Streamed, team: WorkerGroup) -> Any:
    """Returns a dataset of the answers of ``todo``: parts are prepared, worked on and, a shard at a time, joined.

    Parts keep their order and every shard has equally many, some of them empty: so the last operator, which takes that
    many rows, gets the parts of one shard.
    """
    most = max(make.parts(task) for task in todo)
    prepares, joins = make.prepare, make.join  # not with what works: decoders need no torch
    prepare = step(ctx.stage, make.parts, lambda: prepares, of_workers=False)
    work = step(ctx.stage, make.parts, partial(_with_own_gpus, make.work, team.worker.gpus), of_workers=True)
    join = publisher(ctx.store, ctx.stage, lambda: joins, alone=False)
    decoders = team.count * team.helpers
    dataset = _parts(todo, most)
    dataset.context.execution_options.preserve_order = True
    return (
        dataset.map_batches(prepare, batch_size=1, batch_format="pyarrow", **_pool(team.helper, decoders))
        .map_batches(work, batch_size=1, batch_format="pyarrow", **_pool(team.worker, team.count))
        .map_batches(join, batch_size=most, **_pool(Resources(0.0, labels=team.worker.labels), team.count))
    )
