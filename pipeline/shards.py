"""One shard out for every task, on Ray Data workers. The only user of Ray Data.

Progress is the shard records in the store, never anything of Ray's: what has a record is not done again.
"""

from __future__ import annotations

import json
import logging
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.artifacts import (
    Artifact,
    Shard,
    ShardRow,
    ShardTable,
    publish_artifact,
    publish_shard,
    read_each_shard,
    read_shard,
    shard_path,
)
from pipeline.errors import CorruptObject, UserError
from pipeline.graph import Context
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.store import Store


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to make: its number and key, and the input shards it is made from."""

    number: int
    key: str
    inputs: Mapping[str, ShardRow]


@dataclass(frozen=True)
class ShardOutput:
    """What a worker made of one shard."""

    ledger: Ledger
    blobs: Mapping[str, bytes]
    counts: Mapping[str, int] = field(default_factory=dict)


Worker = Callable[[ShardTask], ShardOutput]


def map_shards(
    ctx: Context, tasks: Sequence[ShardTask], make_worker: Callable[[], Worker], unit: str = "rows", rows: int = 0
) -> Artifact:
    """Make every shard that has no record yet, then publish the artefact that lists them all; as ``run_shards``."""
    began = time.monotonic()
    table, made = ShardTable(), 0
    for shard, new in _each_shard(ctx, tasks, make_worker, unit, rows, ctx.stage):
        table.add(shard)
        made += new
    blob, ledger = table.write(ctx.store)
    metrics = {"shards": len(tasks)}
    artifact = ctx.publishable(shard_table=blob, ledger=ledger, metrics=metrics, times={"shards_made": made})
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)


def run_shards(
    ctx: Context,
    tasks: Sequence[ShardTask],
    make_worker: Callable[[], Worker],
    unit: str,
    amount: int,
    title: str | None = None,
) -> tuple[list[Shard], int]:
    """Make every shard that has no record yet. Returns all shards by rising number, and how many were made now.

    ``make_worker`` is pickled and called once in every worker process. ``amount`` counts the units of all tasks, as
    ledgers count them, for the progress line. With ``ctx.settings.workers`` 0 the worker runs in this process, without
    Ray.
    """
    found = list(_each_shard(ctx, tasks, make_worker, unit, amount, title or ctx.stage))
    return sorted((shard for shard, _ in found), key=lambda shard: shard.number), sum(new for _, new in found)


def _each_shard(
    ctx: Context,
    tasks: Sequence[ShardTask],
    make_worker: Callable[[], Worker],
    unit: str,
    amount: int,
    title: str,
) -> Iterator[tuple[Shard, bool]]:
    """Every shard, in no order, and whether it was made now.

    A listing alone decides what is made first. The records that were there are read last; a corrupt one is made again.
    """
    paths = {shard_path(ctx.stage, task.key) for task in tasks}
    there = {entry.path for entry in ctx.store.list(f"shards/{ctx.stage}/") if entry.path in paths}
    todo = [task for task in tasks if shard_path(ctx.stage, task.key) not in there]
    done = [task for task in tasks if shard_path(ctx.stage, task.key) in there]
    guess = amount * len(done) // max(1, len(tasks))
    with Progress(title, amount, unit, start=guess) as progress:
        for shard in _run(ctx, todo, make_worker):
            progress.advance(shard.ledger.rows)
            yield shard, True
        lost, rows = [], 0
        for task, read in zip(done, read_each_shard(ctx.store, ctx.stage, [t.key for t in done]), strict=True):
            if read is None:
                lost.append(task)
            else:
                rows += read.ledger.rows
                yield read, False
        progress.first += rows - guess
        progress.done += rows - guess
        for shard in _run(ctx, lost, make_worker):
            progress.advance(shard.ledger.rows)
            yield shard, True


def _run(ctx: Context, todo: Sequence[ShardTask], make_worker: Callable[[], Worker]) -> Iterator[Shard]:
    if not todo:
        return
    workers = min(ctx.settings.workers, len(todo))
    if workers == 0:
        worker = make_worker()
        for task in todo:
            yield _make(ctx.store, ctx.stage, worker, task)
        return
    from pipeline.launch import start_ray

    ray = start_ray(ctx.config.run.ray)
    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # to the console; its log file keeps everything
            handler.setLevel(logging.ERROR)
    dataset = ray.data.from_items(
        [{"task": pickle.dumps(task)} for task in todo], override_num_blocks=len(todo)
    ).map_batches(
        _actor(ctx.store, ctx.stage, make_worker),
        batch_size=1,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    for row in dataset.iter_rows():
        ctx.store.traffic.add(**json.loads(row["requests"]))
        yield _answer(row["answer"])


def _make(store: Store, stage: str, worker: Worker, task: ShardTask) -> Shard:
    """One shard, unless another driver has made it meanwhile."""
    made = read_shard(store, stage, task.key)
    if made is not None:
        return made
    output = worker(task)
    return publish_shard(store, stage, task.number, task.key, output.ledger, output.blobs, output.counts)


def _actor(store: Store, stage: str, make_worker: Callable[[], Worker]) -> type:
    """A class for Ray Data around a worker. What a person can mend travels back as a value, not as a traceback."""

    class ShardActor:
        def __init__(self) -> None:
            self.worker = make_worker()

        def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
            answers = [self.answer(pickle.loads(task)) for task in batch["task"]]
            return {"answer": answers, "requests": [json.dumps(store.traffic.take()) for _ in answers]}

        def answer(self, task: ShardTask) -> str:
            try:
                shard = _make(store, stage, self.worker, task)
            except UserError as e:
                return json.dumps({"user_error": str(e)})
            except CorruptObject as e:
                return json.dumps({"corrupt": [e.path, e.why]})
            return json.dumps({"shard": [shard.number, shard.key, shard.ledger.as_json(), shard.blobs, shard.counts]})

    return ShardActor


def _answer(text: str) -> Shard:
    answer = json.loads(text)
    if "user_error" in answer:
        raise UserError(answer["user_error"])
    if "corrupt" in answer:
        raise CorruptObject(*answer["corrupt"])
    number, key, ledger, blobs, counts = answer["shard"]
    return Shard(number, key, Ledger.from_json(ledger), blobs, counts)
