"""Measures in parts what a list of hundreds of millions of pairs takes, and says what breaks first as it grows.

    python -m benchmarks.billion                                # everything, one part after the other
    python -m benchmarks.billion --part near --size 400000      # one part, at one size: minutes

web: images that one worker of the fetch gets out of a web with dead, slow and wrong hosts (benchmarks.fake_web); size:
rows of the list. near: near-duplicates among embeddings of 32 dimensions (benchmarks.near_duplicates); size: rows.
wide: the same with 768 dimensions, apart from the comparison of pairs, which takes most of the time of long lists;
size: rows. driver: what Ray's driver takes for a shard, and for a part of a shard between decoder and encoder; size:
shards. records: records of shards, lists of shards, a plan, and the start of a training's worker, in a folder in
memory; size: shards of 10,000 rows. passes: requests and objects of the passes that find near-duplicates, counted from
the tasks that the driver makes, of which no worker does any; size: rows. plan: ``unclip plan --probe`` beside the run
that it plans, from a server that plays the web to a decoder of nano's size; size: rows. simulation: arithmetic from all
of these for 650 million and 5 billion rows.

A part is a process of its own. Times are those of a core unless they are said to be by the clock, so that other work on
the machine hardly counts. Each part writes its constants, with machine and date, into the file --to, by default the one
with which docs/scale.md is compared. Linux only.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import yaml
from threadpoolctl import threadpool_limits

from benchmarks import near_duplicates, streaming
from benchmarks.fake_web import SPEED, fetch_web
from benchmarks.pairs import SMALL, make_pictures, serving
from benchmarks.simulation import ROWS, SHARD_ROWS, WIDTH, Constants, Simulation
from benchmarks.timing import begin, cpu, finish, load, parser, peak_memory
from jobs.project import open_project
from pipeline.data.curation.near_rows import FIRST_ROWS
from pipeline.data.neighbours.clusters import Rows, compare
from pipeline.data.source.stage import CAPTIONED
from pipeline.graph.artifacts import (
    Artifact,
    Shard,
    load_artifact,
    publish_artifact,
    read_shards,
    write_shard_table,
)
from pipeline.graph.plan import plan
from pipeline.graph.shards import map_shards
from pipeline.graph.stages import Context, Stage, shard_key
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.settings import RaySettings, ShardSettings
from pipeline.store import open_store
from pipeline.training.feed.order import Order
from pipeline.training.feed.tables import Tables
from tests.pipeline.data.curation.near import requests

FILE = Path(__file__).parents[1] / "lab/billion.json"
WEB_ROWS, RECALL_ROWS = 8000, 1_000_000


# --- parts ------------------------------------------------------------------------------------------------------------


def web(rows: int) -> dict[str, float]:
    """Faster on short lists, whose rates say nothing."""
    return fetch_web(rows, max(SPEED, SPEED * WEB_ROWS / rows))


def near(rows: int) -> dict[str, float]:
    """Compares with exact search up to RECALL_ROWS."""
    if rows <= RECALL_ROWS:
        recall, (run,) = near_duplicates.compare(rows, 32, 1, plain=False)
        found = {"recall": recall}
    else:
        found, run = {}, near_duplicates.measure(near_duplicates.listed(rows, 32), plain=False)
    return {
        **found,
        "seconds": run.seconds,
        "requests_a_row": run.requests / rows,
        "objects_a_row": run.objects / rows,
    }


def wide(rows: int) -> dict[str, float]:
    """Also compares a cluster of that many rows alone; what curation takes of it, in its first stretch, is left out."""
    vectors = near_duplicates.listed(rows, WIDTH)
    side = min(FIRST_ROWS, rows)
    numbers = np.arange(side)
    same = np.zeros(side, np.int32)
    one = Rows(numbers, same.astype(np.int8), same.astype(np.int8), vectors[:side], same, same[:, None])
    began = time.process_time()
    with threadpool_limits(1):
        compare(one, near_duplicates.BOUND, None)
    pair = (time.process_time() - began) / side**2
    rest = near_duplicates.measure(vectors, plain=False).seconds - pair * side**2
    return {"nanoseconds_a_pair": 1e9 * pair, "microseconds_a_row": 1e6 * rest / rows}


def driver(shards: int) -> dict[str, float]:
    """Times of the driver's process: the difference between many shards and few, without Ray's start."""
    import ray

    few, busy = max(1, shards // 5), dict[int, float]()
    # First, as a Ray of this machine alone leaves a token behind.
    parts = {count: _streamed(count) for count in (few // 10 + 4, shards // 10 + 8)}
    for count in (few, shards):
        with tempfile.TemporaryDirectory() as folder:
            ctx = Context(
                open_store(folder), "pairs", 1, "key", Recipe(), ShardSettings(2), {}, ray=RaySettings(cpus=2)
            )
            tasks = [ShardTask(number, sha256(number), {}) for number in range(count)]
            began = time.process_time()
            map_shards(ctx, tasks, open_packer)
            busy[count] = time.process_time() - began
            ray.shutdown()
    return {"milliseconds_a_shard": 1e3 * _growth(busy), "milliseconds_a_part": 1e3 * _growth(parts) / streaming.PARTS}


def _streamed(shards: int) -> float:
    options = argparse.Namespace(shards=shards, cores=2, encode_s=0.02, slack=0.8)
    with tempfile.TemporaryDirectory() as folder:
        milliseconds = streaming.measure(options, folder)["driver_ms_per_part"]
    return 1e-3 * milliseconds * streaming.PARTS * shards


def _growth(by_size: Mapping[int, float]) -> float:
    """Returns by how much a value grows with a size, from the smallest to the largest."""
    low, high = min(by_size), max(by_size)
    return (by_size[high] - by_size[low]) / (high - low)


def records(shards: int) -> dict[str, float]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        store, made = open_store(folder), {}
        for name, blob in (("source", "refs"), ("captions", "captions")):
            listed = (
                Shard(n, sha256(name, n), Ledger(SHARD_ROWS), {blob: sha256(blob, n)}, {CAPTIONED: SHARD_ROWS})
                for n in range(shards)
            )
            table, ledger = write_shard_table(store, listed)
            made[name] = publish_artifact(store, Artifact(name, KEYS[name], {}, {}, ledger, shard_table=table), 0.0)
        keys = {verdict.stage: verdict.key for verdict in plan(GRAPH, KEYS, "billion", store, {})}
        busy = 0.0
        for name in ("pairs", "embeddings", "curation"):
            stage = GRAPH[name]
            inputs = {before: made[before] for before in stage.inputs}
            ctx = Context(store, name, 1, keys[name], stage.recipe, ShardSettings(0), inputs)
            began = time.process_time()
            made[name] = stage.run(ctx)
            busy += time.process_time() - began
        held = peak_memory()
        began = time.process_time()
        assert all(verdict.state == "fresh" for verdict in plan(GRAPH, KEYS, "billion", store, {}))
        planned = time.process_time() - began
        began = time.process_time()
        inputs = {name: artifact for name in GRAPH if (artifact := load_artifact(store, name, keys[name]))}
        tables = Tables(store, inputs, ("image", "tokens", "image_embedding"), "train", 64)
        Order(tables.counts, 64, 256, seed=0).rows(0, 0, 256)
        started = time.process_time() - began
    return {
        "milliseconds_a_record": 1e3 * busy / (3 * shards),
        "driver_bytes": held,
        "plan_seconds": planned,
        "start_seconds": started,
    }


def passes(rows: int) -> dict[str, float]:
    asked, made = requests(rows, SHARD_ROWS)
    return {"requests_a_row": asked, "objects_a_row": made, "driver_bytes": peak_memory()}


def plan_and_run(rows: int) -> dict[str, float]:
    """By the clock. A stage's figure is the larger of plan and run over the smaller."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        make_pictures(folder / "pictures", SMALL, 64)
        with serving(folder / "pictures", 0.2, 0.6) as site:
            values = {
                "project": "planned",
                "preset": "nano",
                "store": str(folder / "store"),
                "source": {"paths": [str(site.write_web_list(folder / "list.csv", rows))], "shard_rows": 100},
                "pairs": {"allow": ["127.0.0.0/8"]},
                "bundle": {"models": ["diffusion_prior", "decoder"], "sampling": {"size": 64}},
                "run": {"output": str(folder / "out"), "pairs": {"timeout_s": 4.0}, "budget_hours": 1000},
            }
            config = folder / "planned.yaml"
            config.write_text(yaml.safe_dump(values))
            planned = json.loads(_unclip("plan", config, "--probe", "--json"))
            _unclip("run", config, "--yes")
            made = {stage: artifact.times for stage, artifact in open_project(config).finished().items()}
    took = {stage: max(times.get("whole_seconds", 0.0), times["seconds"]) for stage, times in made.items()}
    factors = {}
    for one in planned["stages"]:
        stage, cost = one["stage"], one["cost"]
        a, b = cost["seconds"], took[stage]
        low, high = cost["between"] or (a, a)
        print(f"  {stage:16} planned {a:8.1f} s ({low:.1f} to {high:.1f}), took {b:8.1f} s", flush=True)
        factors[stage] = max(a, b, 1e-3) / max(min(a, b), 1e-3)
    long = [stage for stage in factors if took[stage] >= 5]
    return {**factors, "worst_of_stages_above_5_s": max(factors[stage] for stage in long)}


def _unclip(*words: object) -> str:
    command = [sys.executable, "-m", "jobs.cli", *map(str, words)]
    done = subprocess.run(command, cwd=FILE.parents[1], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


PARTS: Mapping[str, tuple[Callable[[int], dict[str, float]], tuple[int, ...], tuple[int, ...]]] = MappingProxyType(
    {  # with its sizes, and those of --quick
        "web": (web, (WEB_ROWS,), (200,)),
        "near": (near, (100_000, 400_000, 1_000_000, 2_000_000), (20_000, 40_000)),
        "wide": (wide, (50_000,), (2_000,)),
        "driver": (driver, (1_000,), (20,)),
        "records": (records, (2_000, 20_000), (20, 200)),
        "passes": (passes, (ROWS[0] // 10, *ROWS), (1 << 22, 1 << 24)),
        "plan": (plan_and_run, (2_000,), (120,)),
    }
)


# --- what the records are of ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The recipe of a stage that has nothing to choose."""

    @property
    def splitting(self) -> tuple[str, ...]:
        return ()


KEYS = {"source": "5" * 64, "captions": "c" * 64}


def sha256(*words: object) -> str:
    return hashlib.sha256(repr(words).encode()).hexdigest()


def pack(task: ShardTask) -> ShardOutput:
    """Makes a shard as small as can be, with as many counts as those of pairs have."""
    counts = {f"{split}/{side}": SHARD_ROWS for split in ("train", "validation", "test") for side in (0, 64, 256, 1024)}
    return ShardOutput(Ledger(SHARD_ROWS - 1, {"timeout": 1}), {"index": b"of no rows"}, counts)


def open_packer() -> Callable[[ShardTask], ShardOutput]:
    return pack


def run_stage(ctx: Context) -> Artifact:
    """Makes a shard for each of those that are in all inputs, in this process."""

    def tasks() -> Iterator[ShardTask]:
        listed = [read_shards(ctx.store, made) for made in ctx.inputs.values()]
        for shards in zip(*listed, strict=True):
            inputs = dict(zip(ctx.inputs, shards, strict=True))
            key = shard_key(ctx, {name: shard.key for name, shard in inputs.items()})
            yield ShardTask(shards[0].number, key, inputs)

    return map_shards(ctx, list(tasks()), open_packer)


GRAPH = {
    "source": Stage("source", 1, Recipe(), (), run_stage, "source"),
    "captions": Stage("captions", 1, Recipe(), (), run_stage, "source"),
    "pairs": Stage("pairs", 1, Recipe(), ("source",), run_stage),
    "embeddings": Stage("embeddings", 1, Recipe(), ("pairs", "captions"), run_stage),
    "curation": Stage("curation", 1, Recipe(), ("pairs", "embeddings"), run_stage),
}


# --- parts as processes -----------------------------------------------------------------------------------------------


def read(file: Path) -> Constants:
    """Returns the constants in a file, without where they were measured."""
    known = json.loads(file.read_text()) if file.exists() else {}
    return {key: {name: value for name, value in one.items() if name != "measured"} for key, one in known.items()}


def keep(file: Path, key: str, values: Mapping[str, float]) -> None:
    """Adds the constants of a part to a file, with date and machine; those of other parts stay."""
    known = json.loads(file.read_text()) if file.exists() else {}
    where = f"{time.strftime('%Y-%m-%d')}, {cpu()}, {os.cpu_count()} cores, {load()}"
    known[key] = {"measured": where, **{name: float(f"{value:.4g}") for name, value in values.items()}}
    file.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__)
    options.add_argument("--part", choices=[*PARTS, "simulation"], help="the one part to measure")
    options.add_argument("--size", type=int, help="the one size of it")
    options.add_argument("--to", type=Path, help="the file of constants")
    chosen = options.parse_args()
    if chosen.size and chosen.part not in PARTS:
        options.error("--size: name the --part that is measured at it")
    file = chosen.to or (Path(tempfile.mkdtemp(), "billion.json") if chosen.quick else FILE)
    if chosen.size:
        begin(__doc__, chosen)
        values = PARTS[chosen.part][0](chosen.size)
        keep(file, f"{chosen.part} {chosen.size}", values)
        finish(values)
        return
    for part in [chosen.part] if chosen.part else PARTS:
        _, sizes, few = PARTS.get(part, (None, (), ()))
        for size in few if chosen.quick else sizes:
            command = ["--part", part, "--size", str(size), "--to", str(file)]
            subprocess.run([sys.executable, "-m", "benchmarks.billion", *command], check=True)
    measured = {f"{key} {name}": value for key, one in read(file).items() for name, value in one.items()}
    if chosen.part in (None, "simulation"):
        begin("What follows from it", chosen)
        measured = Simulation(read(file)).figures()
        for name, value in measured.items():
            print(f"  {name:48} {value:.4g}")
    finish(measured)


if __name__ == "__main__":
    main()
