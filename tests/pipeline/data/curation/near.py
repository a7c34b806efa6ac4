"""Lists with near rows, what curation has to find in them, and passes that are cut as those of a large list."""

import tempfile
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from unittest import mock

import numpy as np
import pytest

from pipeline.data.curation import near_rows
from pipeline.data.curation.rejected import Rejected
from pipeline.data.curation.stage import CURATION, CurationRecipe
from pipeline.data.neighbours import exchange
from pipeline.data.neighbours.exchange import Fan
from pipeline.graph.artifacts import Artifact, Shard, ShardRow, read_table
from pipeline.graph.stages import Context
from pipeline.graph.workers import ShardTask
from pipeline.ledger import Ledger
from pipeline.store import Store, open_store
from tests.pipeline.data.vectors import CountedStore, Listed, context, curate, planted, publish

BOUND = 0.8
ROWS = 600


def cut_small(monkeypatch: pytest.MonkeyPatch, fan: Fan, group: int = 50) -> None:
    values = {"FIRST_ROWS": 100, "BLOCK_ROWS": 60, "CLUSTER_ROWS": 25, "RANGE_BLOCKS": 2, "GROUP_ROWS": group}
    for name, value in {**values, "ROWS_FAN": fan, "FOUND_FAN": fan}.items():
        monkeypatch.setattr(near_rows, name, value)


def noting(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[list[ShardTask], list[Shard]]]:
    """The tasks of every kind of worker, as the driver makes them, and what it gets back."""
    held: dict[str, tuple[list[ShardTask], list[Shard]]] = defaultdict(lambda: ([], []))
    original = near_rows.run_pass

    def note(ctx: Context, worker: object, tasks: list[ShardTask], *rest: str) -> list[Shard]:
        made = original(ctx, worker, tasks, *rest)
        for noted, new in zip(held[type(worker).__name__], (tasks, made), strict=True):
            noted += new
        return made

    for module in (near_rows, exchange):
        monkeypatch.setattr(module, "run_pass", note)
    return held


def listed(seed: int = 0, rows: int = ROWS) -> Listed:
    """Every tenth row is held out for validation, every tenth for the test; sides reach different stages."""
    vectors, *_ = planted(rows, 64, rows // 3, seed, 0.7)
    vectors = np.random.default_rng(seed).permutation(vectors)
    splits = ["validation" if i % 10 == 3 else "test" if i % 10 == 7 else "train" for i in range(rows)]
    g = np.random.default_rng(seed)
    return Listed(vectors, splits, [(64, 100, 256, 1024)[i] for i in g.integers(0, 4, rows)])


def all_pairs(rows: Listed) -> dict[str, Rejected]:
    """What curation rejects if it looks at every pair."""
    vectors = rows.vectors.astype(np.float64)
    near = vectors @ vectors.T >= BOUND
    near |= (rows.vectors[:, None] == rows.vectors[None]).all(2)
    splits = np.array(rows.splits)
    sizes = np.searchsorted([64, 256, 1024], rows.sides, side="right")
    keys = rows.row_keys
    found = {}
    for i in range(len(keys)):
        held = np.flatnonzero(near[i] & (splits != "train") & (splits[i] == "train"))
        twins = np.flatnonzero(near[i, :i] & (splits[:i] == splits[i]) & (sizes[:i] >= sizes[i]))
        if len(held):
            found[keys[i]] = Rejected(keys[i], "near_held_out", keys[held[0]])
        elif len(twins):
            found[keys[i]] = Rejected(keys[i], "near_duplicate", keys[twins[0]])
    return found


def run(store: Store, rows: Listed, workers: int = 0) -> Artifact:
    return curate(store, publish(store, rows), workers, near_duplicate=BOUND, near_held_out=BOUND)


def requests(rows: int, shard_rows: int = 1 << 14) -> tuple[float, float]:
    """Requests and objects a row of all passes over a list of such shards, of which no row is made.

    Every table, pack and cluster is counted, and the record of every task.
    """
    counts = Counter[str]()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        store = CountedStore(open_store(folder))

        @cache
        def listed_packs(table: str) -> int:
            return read_table(store, table).num_rows

        def count(ctx: Context, worker: object, tasks: list[ShardTask], *rest: str) -> list[Shard]:
            kind = type(worker).__name__
            for task in tasks:
                names = Counter(name.partition(" ")[0] for name in task.inputs)
                counts["read"] += 1 + names["curated"] + names["embeddings"] + names["sample"] + names["clusters"]
                tables = [part.blobs["packs"] for part in task.inputs.values() if "packs" in part.blobs]
                counts["read"] += sum(1 + 2 * listed_packs(table) for table in tables)
                counts["made"] += 1 + (names["judged"] if kind == "MergeFound" else 1)
            blobs = {"FitClusters": "clusters", "SampleVectors": "sample"}
            return [Shard(i, t.key, Ledger(1), {blobs.get(kind, "pack"): t.key}) for i, t in enumerate(tasks)]

        for module in (near_rows, exchange):
            stack.enter_context(mock.patch.object(module, "run_pass", count))
        stack.enter_context(mock.patch.object(near_rows, "number_of", return_value=0))
        shards = [ShardRow(i, f"{i}", shard_rows, 0, {}, {}) for i in range(rows // shard_rows)]
        ctx = context(store, replace(CURATION, recipe=CurationRecipe(), inputs=()), {})
        near_rows.find_near_rows(ctx, shards, dict(enumerate(shards)))
        return counts["read"] / rows, (counts["made"] + len(store.created)) / rows
