"""What a driver with 10,000 shards holds in memory, and how long it needs to see what has to be made.

A stage that is made up is run in this process, without Ray, by the real plan and the real map_shards, from a list of
shards that it reads as every stage does. Each measurement is a fresh process. Memory is the highest of a driver
(VmHWM) that makes every shard in a folder, with 1,000 shards and with ten times as many. Times are those of a driver on
S3 (SeaweedFS on this machine) that finds the record of every shard but one: until it begins to make that one, and until
all are listed; of one that finds the artefact too, from its start to its end; and of one that plans a graph of three
such stages and looks for what is missing in each, from its start to its end.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace

from pipeline.graph.artifacts import (
    Artifact,
    Shard,
    artifact_path,
    load_artifact,
    publish_artifact,
    publish_shard,
    read_shards,
    shard_path,
    write_shard_table,
)
from pipeline.graph.execute import execute
from pipeline.graph.plan import plan
from pipeline.graph.shards import ShardOutput, ShardTask, map_shards
from pipeline.graph.stages import Context, Graph, Stage, shard_key
from pipeline.ledger import Ledger
from pipeline.settings import RaySettings, ShardSettings
from pipeline.store import Store, open_store

GROWTH, DECIDING_S, NOTHING_S, STALENESS_S = 1.2, 5.0, 2.0, 5.0  # what is wanted
STAGES = ("pairs", "embeddings", "curation")
ROWS = 1000


@dataclass(frozen=True)
class Recipe:
    """Of a stage that has nothing to choose."""


def pack(task: ShardTask) -> ShardOutput:
    """A shard as small as can be, with as many names as those of pairs have."""
    number = str(task.number)
    counts = {f"{split}/{side}": ROWS for split in ("train", "validation", "test") for side in (64, 256, 1024)}
    return ShardOutput(
        Ledger(ROWS - 1, {"timeout": 1}), {n: f"{n} {number}".encode() for n in ("images", "index")}, counts
    )


def tasks_of(ctx: Context) -> list[ShardTask]:
    """One for each shard of the source."""
    listed = read_shards(ctx.store, ctx.inputs["source"])
    return [ShardTask(s.number, shard_key(ctx, {"source": s.key}), {"source": s}) for s in listed]


def run_pairs(ctx: Context) -> Artifact:
    tasks = tasks_of(ctx)
    return map_shards(ctx, tasks, lambda: pack, "rows", ROWS * len(tasks))


def no_source(ctx: Context) -> Artifact:
    raise AssertionError("it is there")


GRAPH: Graph = {
    "source": Stage("source", 1, Recipe(), (), no_source),
    "pairs": Stage("pairs", 1, Recipe(), ("source",), run_pairs),
}
WIDE = GRAPH | {stage: Stage(stage, 1, Recipe(), ("source",), run_pairs) for stage in STAGES}
CONFIG = SimpleNamespace(run=SimpleNamespace(pairs=ShardSettings(0), ray=RaySettings(), lease_s=60.0))


def publish_source(store: Store, shards: int) -> Artifact:
    """The artefact of a list with this many shards, without the lists themselves."""

    def name(*words: object) -> str:
        return hashlib.sha256(repr(words).encode()).hexdigest()

    listed = (Shard(n, name("key", n), Ledger(ROWS), {"refs": name("refs", n)}, {}) for n in range(shards))
    table, ledger = write_shard_table(store, listed)
    return publish_artifact(store, Artifact("source", "s" * 64, {}, {}, ledger, shard_table=table), 0.0)


def context(store: Store, stage: str = "pairs") -> Context:
    """As a run gives it to the stage."""
    keys = {verdict.stage: verdict.key for verdict in plan(WIDE, {"source": "s" * 64}, "many", store, {})}
    source = load_artifact(store, "source", keys["source"])
    assert source is not None
    return Context(store, stage, 1, keys[stage], Recipe(), ShardSettings(0), {"source": source}, CONFIG)


# --- what the fresh processes do --------------------------------------------------------------------------------------


def make(store: Store) -> dict[str, float]:
    """The plan, and everything that it calls stale."""
    verdicts = plan(GRAPH, {"source": "s" * 64}, "many", store, {})
    execute(GRAPH, verdicts, set(GRAPH), store, CONFIG, lambda *_: None, lambda *_: None)  # type: ignore[arg-type]
    lines = Path("/proc/self/status").read_text().splitlines()
    return {"bytes": next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))}


def decide(store: Store) -> dict[str, float]:
    """The plan, and the stage until its worker is asked for the one shard that is missing, and until its end."""
    began, asked = perf_counter(), []

    def worker(task: ShardTask) -> ShardOutput:
        asked.append(perf_counter() - began)
        return pack(task)

    ctx = context(store)
    tasks = tasks_of(ctx)
    map_shards(ctx, tasks, lambda: worker, "rows", ROWS * len(tasks))
    assert len(asked) == 1, "more than one shard was made"
    return {"deciding": asked[0], "listing": perf_counter() - began}


class Missing(Exception):
    """The first shard that has to be made."""


def ask(store: Store) -> dict[str, float]:
    """The plan of all stages, and each of them until its worker is asked for what is missing."""

    def worker(task: ShardTask) -> ShardOutput:
        raise Missing(task.number)

    found = []
    for stage in STAGES:
        ctx = context(store, stage)
        tasks = tasks_of(ctx)
        try:
            map_shards(ctx, tasks, lambda: worker, "rows", ROWS * len(tasks))
        except Missing as e:
            found.append(e.args[0])
    assert found == [len(tasks) - 1] * len(STAGES), "something else was missing"
    return {"stages": len(found)}


DEEDS = {"make": make, "decide": decide, "ask": ask}


def child(deed: str, url: str) -> tuple[dict[str, float], float]:
    """What a fresh process prints, and the seconds that it took."""
    start = perf_counter()
    command = [sys.executable, "-m", "benchmarks.many_shards", "--deed", deed, url]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(run.stdout.splitlines()[-1]), perf_counter() - start


# --- the measurements -------------------------------------------------------------------------------------------------


def memory(shards: int) -> float:
    """Bytes of a driver at its highest."""
    with tempfile.TemporaryDirectory() as folder:
        publish_source(open_store(folder), shards)
        return child("make", folder)[0]["bytes"]


def fill(store: Store, shards: int) -> None:
    """The source, and the record of every shard of each stage but the last, without blobs, which nobody reads."""
    publish_source(store, shards)
    for stage in STAGES:

        def record(task: ShardTask, stage: str = stage) -> None:
            made = pack(task)
            publish_shard(store, stage, task.number, task.key, made.ledger, {}, made.counts)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(record, tasks_of(context(store, stage))[:-1]))


def times(shards: int, rounds: int) -> dict[str, float]:
    """Medians of the seconds to decide, to list, to find that there is nothing to do, and what is stale in a graph."""
    store = open_store("s3://unclip/many")
    fill(store, shards)
    ctx = context(store)
    last = shard_path("pairs", tasks_of(ctx)[-1].key)
    found: dict[str, list[float]] = {"deciding": [], "listing": [], "nothing": [], "staleness": []}
    for _ in range(rounds):
        found["staleness"].append(child("ask", store.url)[1])
        for name, seconds in child("decide", store.url)[0].items():
            found[name].append(seconds)
        found["nothing"].append(child("make", store.url)[1])
        store.delete([artifact_path("pairs", ctx.key), last])
    return {name: median(seconds) for name, seconds in found.items()}


def main() -> None:
    from benchmarks.timing import begin, finish, parser
    from tests.seaweed import serving

    options = parser(__doc__).parse_args()
    few, many = (20, 200) if options.quick else (1000, 10_000)
    begin(__doc__, options)
    held = {shards: memory(shards) for shards in (few, many)}
    for shards, size in held.items():
        print(f"  {shards:6,} shards: {size / 2**20:.0f} MiB at the highest")
    print(f"  {(held[many] - held[few]) / (many - few) / 1024:.1f} KiB a shard")
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server:
        os.environ.update(server.environment)
        start = perf_counter()
        seconds = times(many, 1 if options.quick else min(options.rounds, 3))
        print(
            f"  {many:6,} shards on S3: what has to be made is known after {seconds['deciding']:.2f} s, all are listed"
        )
        print(f"  after {seconds['listing']:.1f} s; with nothing to do it ends after {seconds['nothing']:.2f} s")
        print(f"  what is missing in each of {len(STAGES)} such stages is known after {seconds['staleness']:.2f} s")
        print(f"  ({perf_counter() - start:.0f} s in all)")
    finish(
        {
            "memory_over_bound": held[many] / held[few] / GROWTH,
            "deciding_over_bound": seconds["deciding"] / DECIDING_S,
            "nothing_to_do_over_bound": seconds["nothing"] / NOTHING_S,
            "staleness_over_bound": seconds["staleness"] / STALENESS_S,
        }
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--deed"]:
        print(json.dumps(DEEDS[sys.argv[2]](open_store(sys.argv[3]))))
    else:
        main()
