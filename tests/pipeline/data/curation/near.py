"""Lists with near rows, what curation has to find in them, and passes that are cut as those of a large list."""

from collections import defaultdict

import numpy as np
import pytest

from pipeline.data.curation import near_rows
from pipeline.data.curation.rejected import Rejected
from pipeline.data.neighbours import exchange
from pipeline.data.neighbours.exchange import Fan
from pipeline.graph.artifacts import Artifact, Shard
from pipeline.graph.stages import Context
from pipeline.graph.workers import ShardTask
from pipeline.store import Store
from tests.pipeline.data.vectors import Listed, curate, planted, publish

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
        held = np.flatnonzero(near[i] & (splits != "train")) if splits[i] == "train" else []
        twins = np.flatnonzero(near[i, :i] & (splits[:i] == splits[i]) & (sizes[:i] >= sizes[i]))
        if len(held):
            found[keys[i]] = Rejected(keys[i], "near_held_out", keys[held[0]])
        elif len(twins):
            found[keys[i]] = Rejected(keys[i], "near_duplicate", keys[twins[0]])
    return found


def run(store: Store, rows: Listed, workers: int = 0) -> Artifact:
    return curate(store, publish(store, rows), workers, near_duplicate=BOUND, near_held_out=BOUND)
