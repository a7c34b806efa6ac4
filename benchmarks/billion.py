"""A simulation of one billion pairs: 100,000 shards of 10,000 rows, without a pixel, in a folder.

Everything that the pipeline itself keeps of so many rows is real: keys and records of the shards of three stages, the
tables that list them, the plan, and the order and the tables of a training's worker. What the shards hold is made up:
one blob for all. Each measurement is a fresh process; memory is its highest (VmHWM). First a tenth of the shards, then
all: what a worker needs, of a data stage and of a training, may not grow with their number. The folder is in memory
where the machine has such a one, since each of 300,000 records waits for a disk twice; --folder names another.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace

from pipeline.graph.artifacts import Artifact, Shard, load_artifact, publish_artifact, read_shards, write_shard_table
from pipeline.graph.execute import execute
from pipeline.graph.plan import plan
from pipeline.graph.shards import ShardOutput, ShardTask, map_shards
from pipeline.graph.stages import Context, Graph, Stage, shard_key
from pipeline.ledger import Ledger
from pipeline.settings import RaySettings, ShardSettings
from pipeline.store import Store, open_store

ROWS = 10_000
MINUTES, GIB, GROWTH = 10.0, 4.0, 1.1  # what is wanted
STEPS, BATCH, LANES, WINDOW = 2000, 2048, 64, 256  # of the training whose order is drawn
KEYS = {"source": "s" * 64, "captions": "c" * 64}


@dataclass(frozen=True)
class Recipe:
    """Of a stage that has nothing to choose."""


def sha256(*words: object) -> str:
    return hashlib.sha256(repr(words).encode()).hexdigest()


def pack(task: ShardTask) -> ShardOutput:
    """A shard as small as can be, with as many counts as those of pairs have."""
    counts = {f"{split}/{side}": ROWS for split in ("train", "validation", "test") for side in (0, 64, 256, 1024)}
    return ShardOutput(Ledger(ROWS - 1, {"timeout": 1}), {"index": b"of no rows"}, counts)


def made_of(ctx: Context, *names: str) -> Iterator[ShardTask]:
    """A task for each shard, from the shards of these inputs, as the stages make theirs."""
    listed = [read_shards(ctx.store, ctx.inputs[name]) for name in names]
    for shards in zip(*listed, strict=True):
        inputs = dict(zip(names, shards, strict=True))
        yield ShardTask(shards[0].number, shard_key(ctx, {n: s.key for n, s in inputs.items()}), inputs)


def run_pairs(ctx: Context) -> Artifact:
    tasks = list(made_of(ctx, "source"))
    return map_shards(ctx, tasks, lambda: pack, "rows", ROWS * len(tasks))


def run_embeddings(ctx: Context) -> Artifact:
    tasks = list(made_of(ctx, "pairs", "captions"))
    return map_shards(ctx, tasks, lambda: pack, "rows", ROWS * len(tasks))


def run_curation(ctx: Context) -> Artifact:
    tasks = list(made_of(ctx, "pairs", "embeddings"))
    return map_shards(ctx, tasks, lambda: pack, "rows", ROWS * len(tasks))


def is_there(ctx: Context) -> Artifact:
    raise AssertionError("it is there")


GRAPH: Graph = {
    "source": Stage("source", 1, Recipe(), (), is_there),
    "captions": Stage("captions", 1, Recipe(), (), is_there),
    "pairs": Stage("pairs", 1, Recipe(), ("source",), run_pairs),
    "embeddings": Stage("embeddings", 1, Recipe(), ("pairs", "captions"), run_embeddings),
    "curation": Stage("curation", 1, Recipe(), ("pairs", "embeddings"), run_curation),
}
ALONE = ShardSettings(0)
CONFIG = SimpleNamespace(
    run=SimpleNamespace(pairs=ALONE, embeddings=ALONE, curation=ALONE, ray=RaySettings(), lease_s=60.0)
)


def keys(store: Store) -> dict[str, str]:
    return {verdict.stage: verdict.key for verdict in plan(GRAPH, KEYS, "billion", store, {})}


def artifacts(store: Store) -> dict[str, Artifact]:
    """Those of all stages, which are there."""
    found = {stage: load_artifact(store, stage, key) for stage, key in keys(store).items()}
    return {stage: artifact for stage, artifact in found.items() if artifact is not None}


# --- what the fresh processes do, each with the seconds that it took --------------------------------------------------


def make(store: Store, shards: int) -> int:
    """The list, the plan, and every shard of every stage; returns how many were made."""
    for stage, blob in (("source", "refs"), ("captions", "captions")):
        listed = (Shard(n, sha256(stage, n), Ledger(ROWS), {blob: sha256(blob, n)}, {}) for n in range(shards))
        table, ledger = write_shard_table(store, listed)
        publish_artifact(store, Artifact(stage, KEYS[stage], {}, {}, ledger, shard_table=table), 0.0)
    verdicts = plan(GRAPH, KEYS, "billion", store, {})
    execute(GRAPH, verdicts, set(GRAPH), store, CONFIG, lambda *_: None, lambda *_: None)  # type: ignore[arg-type]
    return 3 * shards


def look(store: Store, shards: int) -> int:
    """The plan where all is made; returns how many stages are fresh."""
    return sum(verdict.state == "fresh" for verdict in plan(GRAPH, KEYS, "billion", store, {}))


def work(store: Store, shards: int) -> int:
    """A worker of a data stage: a few shards, as any of them comes to it; returns how many."""
    from pipeline.graph.shards import _make

    names = {stage: sha256(stage) for stage in ("pairs", "captions")}
    for number in range(100):
        inputs = {n: Shard(number, key, Ledger(ROWS), {"index": key}, {}) for n, key in names.items()}
        _make(store, "worker", pack, ShardTask(number, sha256("worker", shards, number), inputs), 0.0)  # type: ignore[arg-type]
    return 100


def train(store: Store, shards: int) -> int:
    """The worker of a training of decoder's columns, as large as its share is: the first of 8. Its tables, and of its
    lanes every window of STEPS steps; returns the rows that they give."""
    from pipeline.training.feed.order import Order, lanes_of
    from pipeline.training.feed.tables import Tables

    inputs = {name: made for name, made in artifacts(store).items() if name != "source"}
    tables = Tables(store, inputs, ("image", "tokens", "image_embedding"), "train", 64)
    order = Order(tables.counts, LANES, WINDOW, seed=0)
    rows, stop = 0, STEPS * BATCH // LANES
    for lane in lanes_of(0, 8, LANES):
        for start in range(0, stop, WINDOW):
            found = order.rows(lane, start, min(start + WINDOW, stop))
            rows += len(found)
            for position in {shard for shard, _ in found}:
                tables.blobs(position)
    return rows


DEEDS = {"make": make, "look": look, "work": work, "train": train}


def child(deed: str, url: str, shards: int) -> dict[str, float]:
    """What a fresh process tells: seconds, bytes at the highest, and what its deed returns."""
    command = [sys.executable, "-m", "benchmarks.billion", "--deed", deed, url, str(shards)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(shards: int, where: str) -> dict[str, dict[str, float]]:
    """Each deed in turn, in a new folder."""
    found = {}
    with tempfile.TemporaryDirectory(dir=where) as folder:
        for deed in DEEDS:
            found[deed] = child(deed, folder, shards)
            one = found[deed]
            print(
                f"  {shards:7,} shards, {deed:5} {one['count']:9,.0f}   {one['seconds']:7.1f} s   "
                f"(computing {one['busy']:.1f})   {one['bytes'] / 2**20:6,.0f} MiB",
                flush=True,
            )
    return found


def main() -> None:
    from benchmarks.timing import begin, finish, parser

    arguments = parser(__doc__)
    memory = Path("/dev/shm")
    arguments.add_argument("--folder", default=str(memory) if memory.is_dir() else tempfile.gettempdir())
    options = arguments.parse_args()
    few, many = (20, 200) if options.quick else (10_000, 100_000)
    begin(__doc__, options)
    start = perf_counter()
    before = measure(few, options.folder)
    middle = perf_counter()
    after = measure(many, options.folder)
    whole = perf_counter() - middle
    print(f"  {many * ROWS:,} rows in {options.folder}: {whole:.0f} s; both sizes {perf_counter() - start:.0f} s")
    finish(
        {
            "minutes_over_bound": whole / 60 / MINUTES,
            "memory_over_bound": max(one["bytes"] for one in after.values()) / 2**30 / GIB,
            "data_worker_growth_over_bound": after["work"]["bytes"] / before["work"]["bytes"] / GROWTH,
            "training_worker_growth_over_bound": after["train"]["bytes"] / before["train"]["bytes"] / GROWTH,
        }
    )


def act(deed: str, url: str, shards: int) -> dict[str, float]:
    start = perf_counter()
    count = DEEDS[deed](open_store(url), shards)
    lines = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return {"seconds": perf_counter() - start, "busy": process_time(), "bytes": held, "count": count}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--deed"]:
        print(json.dumps(act(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main()
