"""Runs a configuration in scratch stores, with few rows and samples, to measure what stages take.

A round is two runs. Their rows are spread over the user's own list, and nothing but amounts differs, so a line through
the two tells what the whole will take. Rounds are repeated, and how much their lines differ tells how far that can be
trusted (pipeline.cost.observed).
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.project import Project
from pipeline.config import Config
from pipeline.cost.observed import Observations, observe
from pipeline.data.source.journal import reference_marks
from pipeline.data.source.lists import path_policy, read_rows, serving_lists
from pipeline.data.source.rows import stored_rows
from pipeline.data.source.segments import SourceShard, segment_of
from pipeline.data.source.source import ListRow
from pipeline.graph.artifacts import read_table
from pipeline.progress import counted, duration
from pipeline.sandbox import python_path
from pipeline.store import Store, local_folder, open_store

SHARD_ROWS = 128  # of the scratch list, at most
SHARDS = (2, 6)  # of each run of a round
READ_ROWS = 1_000_000  # of a list, at most: half a minute
READ_SHARDS = 16  # of a longer list
ROUNDS = (2, 4)  # at least, and at most as far as they end within PROBE_SECONDS
PROBE_SECONDS = 600.0
WORKERS = 2  # of a data stage, at most: a worker's rate is what counts
STEPS = 2  # of each training, the first time
TRAINING_SECONDS = 6.0  # of each training, the second time
T = TypeVar("T")


def probe(project: Project, path: str, overrides: Sequence[str], tell: Callable[[str], None]) -> Observations:
    """Runs the rounds and returns what was observed; stages that cannot be made of so few rows are missing.

    ``tell`` takes a line before each run and behind the last one.
    """
    began = time.monotonic()
    found: Observations = {}
    trainings = [stage.name for stage in project.graph.values() if stage.kind == "training"]
    samples: list[dict[str, int]] = []  # of the runs of a round: the same in each, so that only times differ
    with tempfile.TemporaryDirectory(prefix="unclip-probe-") as name, ExitStack() as stack:
        folder, scratch = Path(name), stack.enter_context(_scratch(project.store, name))
        hosts = stack.enter_context(serving_lists(project.config.source.paths, project.graph["pairs"].settings.hosts))
        changes = [f"run.pairs.hosts={json.dumps(dict(hosts))}"]  # else each list's own server starts in every run
        lists = _write_lists(project, folder)
        for number in range(1, ROUNDS[1] + 1):
            for run, (rows, cut) in enumerate(lists):
                if number == 1:
                    samples.append({training: _samples(project.config, training, found) for training in trainings})
                tell(f"probe, round {number}: {counted(rows, 'row')}, a few steps of each training")
                store = f"{scratch}/store-{number}-{run}"
                ours = _amounts(project, folder, run, store, rows, cut, samples[run])
                if said := _run(path, [*overrides, *changes, *ours]):
                    tell(f"  it ended early: {said}")
                seen = observe(open_store(store), project.config.project, project.graph, project.held_out)
                for observed, times in seen.items():
                    found.setdefault(observed, []).extend(times)
            spent = time.monotonic() - began
            if number >= ROUNDS[0] and spent + spent / number > PROBE_SECONDS:
                break
    tell(f"probed in {duration(time.monotonic() - began)}")
    return found


@contextmanager
def _scratch(store: Store, folder: str) -> Iterator[str]:
    """Yields the place of scratch stores: beside a store on S3, where the workers of a cluster reach it, else a folder.

    What is there is deleted behind the block.
    """
    if local_folder(store):
        yield folder
        return
    url = f"{store.url}/probe-{secrets.token_hex(8)}"
    try:
        yield url
    finally:
        there = open_store(url)
        there.delete([entry.path for entry in there.list("")])


def _write_lists(project: Project, folder: Path) -> list[tuple[int, int]]:
    """Writes a list for each run of a round, of rows of the user's own, which is read once.

    Returns how many each has, and rows a shard.
    """
    source = project.config.source
    cut = min(source.shard_rows, SHARD_ROWS)
    # In the scratch list each row may name what any of the lists may; so those that theirs refuses name nothing there.
    forgotten = project.journal.forgotten
    rows = [
        replace(row, url="", captions=()) if row.reject or forgotten & reference_marks(row.url) else row
        for row in _sample(project, max(SHARDS) * cut)
    ]
    columns = {source.image_column: "url", source.caption_column: "captions", source.group_column: "group"}
    columns |= {source.split_column: "split", source.hash_column: "sha256"}
    columns |= {name: name for name in ("license", "attribution")}
    found = []
    for run, shards in enumerate(SHARDS):
        few = [*_spread(rows, min(len(rows), shards * cut), len(rows))]
        table = pa.table({column: [getattr(row, name) for row in few] for column, name in columns.items()})
        pq.write_table(table, folder / f"{run}.parquet")
        found.append((len(few), cut))
    return found


def _sample(project: Project, most: int) -> Iterator[ListRow]:
    """Yields up to ``most`` rows of the user's lists, of each as large a share, spread over what is read of it."""
    total, before = sum(shard.ledger.rows for shard in project.scan.shards), 0
    wanted = min(total, most)
    for index, path in enumerate(project.config.source.paths):
        shards = [shard for shard in project.scan.shards if segment_of(shard.number) == index]
        end = before + sum(shard.ledger.rows for shard in shards)
        share = end * wanted // total - before * wanted // total
        rows, there = _read(project, path, shards, end - before)
        yield from _spread(rows, min(share, there), there)
        before = end


def _read(project: Project, path: str, shards: Sequence[SourceShard], count: int) -> tuple[Iterable[ListRow], int]:
    """Returns rows of a list with ``count`` rows in all, read as they are asked for, and their number.

    They are all of a list of up to READ_ROWS. Of a longer one they are those of READ_SHARDS of the shards that the scan
    has stored, from its first to its last; only if it is not stored, such as one large file before its first run, they
    are its first READ_ROWS.
    """
    stored = [shard for shard in shards if shard.refs]
    if sum(shard.ledger.rows for shard in stored) <= READ_ROWS:
        there = min(count, READ_ROWS)
        return islice(read_rows(path, project.config.source), there), there
    few = [*_spread(stored, min(len(stored), READ_SHARDS), len(stored))]
    rows = chain.from_iterable(_rows_of(project.store, shard) for shard in few)
    return rows, sum(shard.ledger.rows for shard in few)


def _rows_of(store: Store, shard: SourceShard) -> list[ListRow]:
    return stored_rows(read_table(store, shard.refs), read_table(store, shard.captions))


def _spread(items: Iterable[T], wanted: int, total: int) -> Iterator[T]:
    """Yields ``wanted`` of ``total`` items, equally far from each other."""
    for i, item in enumerate(items):
        if i * wanted // total != (i + 1) * wanted // total:
            yield item


def _samples(config: Config, stage: str, seen: Observations) -> int:
    """Returns the samples of a training: a few batches, or as many as take TRAINING_SECONDS by what was seen."""
    batch = getattr(config, stage).batch
    steps = STEPS
    for one in seen.get(stage, ()):
        if one.work:
            steps = max(2 * STEPS, round(TRAINING_SECONDS * one.amount * one.workers / one.work / batch))
    return steps * batch


def _amounts(
    project: Project, folder: Path, run: int, store: str, rows: int, cut: int, samples: dict[str, int]
) -> list[str]:
    """Returns overrides that change how much is done and where it is kept, and nothing else."""
    config = project.config
    share = rows / max(1, sum(shard.ledger.rows for shard in project.scan.shards))
    may = path_policy(config.source, *config.source.paths)
    own: dict[str, Any] = {
        "store": store,
        "source.paths": [str(folder / f"{run}.parquet")],
        "source.shard_rows": cut,
        "source.roots": [*may.named, *may.own],
        "scale": 1,
        "run.output": str(folder / "out"),
        "run.trackers": [],
    }
    for stage in samples:
        settings = getattr(config.run, stage)
        own |= {f"{stage}.samples": samples[stage], f"{stage}.decay": 0, f"run.{stage}.milestones": []}
        own |= {f"run.{stage}.cache_mb": round(settings.cache_mb * share)}  # so that as large a share is found there
    for node in project.graph.values():
        if node.kind == "data" and hasattr(config.run, node.name):
            asked = getattr(config.run, node.name).workers
            own[f"run.{node.name}.workers"] = WORKERS if asked == "auto" else min(WORKERS, asked)
        if node.few:
            own |= {f"{node.name}.{name}": value for name, value in node.few(node.recipe, run > 0).items()}
    return [f"{name}={json.dumps(value)}" for name, value in own.items()]


def _run(path: str, overrides: Sequence[str]) -> str:
    """Runs as a user would, in a process of its own; returns the last line of an error, or ""."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    # -P: no module of the current folder hides one of ours.
    command = [sys.executable, "-P", "-m", "jobs.cli", "run", path, *(f"--set={word}" for word in overrides), "--yes"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    return "" if not done.returncode else (lines[-1].removeprefix("error: ") if lines else f"exit {done.returncode}")
