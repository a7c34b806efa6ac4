"""One shard out for every task, on Ray Data workers. The only user of Ray Data.

Progress is the shard records in the store, never anything of Ray's: what has a record is not done again.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from pipeline.artifacts import Artifact, Shard, ShardRow, publish_artifact, publish_shard, read_shard, write_shard_table
from pipeline.errors import CorruptObject, UserError
from pipeline.graph import Context
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.store import Store

log = logging.getLogger("unclip")


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Needs:
    """What one worker takes. With ``gpus`` it takes no core, else one. It may have ``helpers``, of one core each."""

    gpus: float = 0.0
    helpers: int = 0
    helper_nodes: Mapping[str, str] = field(default_factory=dict)


def map_shards(
    ctx: Context,
    tasks: Sequence[ShardTask],
    make_worker: Callable[[], Worker],
    unit: str = "rows",
    rows: int = 0,
    needs: Needs | None = None,
) -> Artifact:
    """Make every shard that has no record yet, then publish the artefact that lists them all; as ``run_shards``."""
    began = time.monotonic()
    shards, made = run_shards(ctx, tasks, make_worker, unit, rows, needs=needs)
    table, ledger = write_shard_table(ctx.store, shards)
    metrics = {"shards": len(shards)}
    artifact = ctx.publishable(shard_table=table, ledger=ledger, metrics=metrics, times={"shards_made": made})
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)


def run_shards(
    ctx: Context,
    tasks: Sequence[ShardTask],
    make_worker: Callable[[], Worker],
    unit: str,
    amount: int,
    title: str | None = None,
    needs: Needs | None = None,
) -> tuple[list[Shard], int]:
    """Make every shard that has no record yet. Returns all shards by rising number, and how many were made now.

    ``make_worker`` is pickled and called once in every worker process. ``amount`` counts the units of all tasks, as
    ledgers count them, for the progress line. With ``ctx.settings.workers`` 0 the worker runs in this process, without
    Ray.
    """
    there = {entry.path for entry in ctx.store.list(f"shards/{ctx.stage}/")}
    shards: list[Shard] = []
    todo = []
    for task in tasks:
        made = read_shard(ctx.store, ctx.stage, task.key) if f"shards/{ctx.stage}/{task.key}.json" in there else None
        if made is None:
            todo.append(task)
        else:
            shards.append(made)
    done = sum(shard.ledger.rows for shard in shards)
    with Progress(title or ctx.stage, max(amount, done), unit, start=done) as progress:
        for shard in _run(ctx, todo, make_worker, needs or Needs()):
            shards.append(shard)
            progress.advance(shard.ledger.rows)
    return sorted(shards, key=lambda shard: shard.number), len(todo)


def _run(ctx: Context, todo: Sequence[ShardTask], make_worker: Callable[[], Worker], needs: Needs) -> Iterator[Shard]:
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
    _check_room(ray, ctx, workers, needs)
    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # to the console; its log file keeps everything
            handler.setLevel(logging.ERROR)
    dataset = ray.data.from_items(
        [{"task": pickle.dumps(task)} for task in todo], override_num_blocks=len(todo)
    ).map_batches(
        _actor(ctx.store, ctx.stage, make_worker),
        batch_size=1,
        num_cpus=0 if needs.gpus else 1,
        num_gpus=needs.gpus,
        label_selector=dict(ctx.settings.nodes),
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    for row in dataset.iter_rows():
        yield _answer(row["answer"])


def _check_room(ray: Any, ctx: Context, workers: int, needs: Needs) -> None:
    """Raise UserError where the Ray of this machine could only wait for ever. A cluster may grow, and is waited for."""
    local = "RAY_ADDRESS" not in os.environ
    labels = {name for node in ray.nodes() if node["Alive"] for name in node["Labels"]}
    if missing := sorted({*ctx.settings.nodes, *needs.helper_nodes} - labels):
        said = f"run.{ctx.stage}: no node of the cluster has the label {missing[0]}"
        if local:
            raise UserError(f"{said}: set RAY_ADDRESS to a cluster whose nodes have it (ray start --labels)")
        log.warning("%s yet; waiting for one", said)
    cores, has = workers * ((not needs.gpus) + needs.helpers), ray.cluster_resources().get("CPU", 0)
    if local and needs.helpers and has < cores:
        raise UserError(f"run.ray.cpus: {has:.0f} are too few for {cores} processes of run.{ctx.stage}, one core each")
    if local and needs.gpus * workers > (gpus := ray.cluster_resources().get("GPU", 0)):
        raise UserError(f"run.{ctx.stage}.gpus: {workers} workers with {needs.gpus:g} each, but Ray has {gpus:g} GPUs")


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
            return {"answer": [self.answer(pickle.loads(task)) for task in batch["task"]]}

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


# --- parts of a task, under way while others are used -----------------------------------------------------------------


def results_ahead(submit: Callable[..., Future[Any]], calls: Iterable[tuple[Any, ...]], ahead: int) -> Iterator[Any]:
    """The results of ``submit`` for these arguments, in their order, ``ahead`` of them under way from now on.

    Raises what a call raises, when its turn has come.
    """
    calls = iter(calls)
    waiting = deque(submit(*call) for call in islice(calls, ahead))

    def results() -> Iterator[Any]:
        for call in calls:
            waiting.append(submit(*call))
            yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    return results()


class Helpers:
    """Ray actors of one core each, on nodes with these labels, that call ``work`` for one worker. Each takes its turn.

    They end with the process that made them; one that is killed, or whose node is lost, is replaced and its calls made
    again.
    """

    def __init__(self, work: Callable[..., Any], size: int, nodes: Mapping[str, str]):
        import ray

        options: dict[str, Any] = {"num_cpus": 1, "label_selector": dict(nodes)}
        actor: Any = ray.remote(**options, max_restarts=-1, max_task_retries=-1)(_Helper)
        self._turns = cycle([actor.remote(work) for _ in range(size)])

    def submit(self, *arguments: Any) -> Future[Any]:
        """As ``Executor.submit``, without the function."""
        return next(self._turns).call.remote(*arguments).future()


class _Helper:
    def __init__(self, work: Callable[..., Any]):
        self.work = work

    def call(self, *arguments: Any) -> Any:
        return self.work(*arguments)
