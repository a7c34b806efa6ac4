"""Plants near-duplicates among random embeddings; measures how many curation finds, and how what it takes grows.

Vectors are spread evenly: they have no clusters. A tenth of the rows are planted: each has a cosine, spread evenly from
the bound to 1, with a row of the first half. Shards of 1,000 rows are curated by the stage itself, in this process, in
a store in a temporary folder, which counts requests and objects. Exact search compares 20,000 rows of the second half
with all rows before them, with verdicts in fp64.
"""

import tempfile
from math import log
from statistics import median
from time import perf_counter

import numpy as np

from benchmarks.timing import begin, finish, parser
from pipeline.graph.artifacts import Artifact
from pipeline.store import open_store
from tests.pipeline.data import vectors as lists
from tests.pipeline.data.vectors import CountedStore, Listed, curate, planted, publish, rejected

BOUND = 0.96
SHARD_ROWS = 1000
ASKED = 20_000


def exact(vectors: np.ndarray, asked: np.ndarray) -> set[int]:
    """Returns those of the ``asked`` rows that have an earlier row near them."""
    found: set[int] = set()
    for start in range(0, len(vectors), 1 << 14):
        there = vectors[start : start + (1 << 14)].astype(np.float32).T
        for rows in np.array_split(asked, -(-len(asked) // (1 << 12))):
            a, b = np.nonzero(vectors[rows].astype(np.float32) @ there >= BOUND - 1e-3)
            row, other = rows[a], start + b
            earlier = other < row
            pairs = vectors[row[earlier]].astype(np.float64) * vectors[other[earlier]].astype(np.float64)
            found |= set(row[earlier][pairs.sum(1) >= BOUND].tolist())
    return found


def timed(store: CountedStore, inputs: dict[str, Artifact], bound: float | None) -> tuple[float, Artifact]:
    """Returns the seconds of curation, and what it made. The store counts from its start."""
    store.read_paths.clear()
    store.created.clear()
    start = perf_counter()
    made = curate(store, inputs, near_duplicate=bound, near_held_out=None)
    return perf_counter() - start, made


def measure(vectors: np.ndarray) -> tuple[set[int], float, float, float, float]:
    """Returns the rejected rows, the seconds of curation with and without looking for near rows, requests, objects."""
    with tempfile.TemporaryDirectory() as folder:
        store = CountedStore(open_store(folder))
        inputs = publish(store, Listed(vectors, ["train"] * len(vectors), [64] * len(vectors)))
        seconds, made = timed(store, inputs, BOUND)
        taken = len(store.read_paths), len(store.created)
        rows = {int(row.key[:8]) * SHARD_ROWS + int(row.key[8:]) for row in rejected(store, made)}
        return rows, seconds, timed(store, inputs, None)[0], *taken


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[100_000, 200_000, 400_000], help="sizes, rising")
    options.add_argument("--width", type=int, default=32, help="components; pairs of few are harder to find (32)")
    chosen = options.parse_args()
    sizes = [20_000, 40_000] if chosen.quick else chosen.rows
    begin(__doc__, chosen)
    lists.SHARD_ROWS = SHARD_ROWS
    recalls, seconds, requests, objects = [], [], [], []
    for rows in sizes:
        vectors, *_ = planted(rows, chosen.width, rows // 10, rows, BOUND)
        half = np.arange(rows // 2, rows)
        asked = np.sort(np.random.default_rng(rows).choice(half, min(ASKED, len(half)), replace=False))
        true = exact(vectors, asked)
        runs = [measure(vectors) for _ in range(1 if chosen.quick else min(chosen.rounds, 3))]
        found = runs[0][0]
        assert all(run[0] == found for run in runs), "two runs of one list found different rows"
        assert found & set(asked.tolist()) <= true, "a row was rejected that has no earlier row near it"
        recalls.append(len(found & true) / len(true))
        seconds.append(median(run[1] for run in runs))
        plain = median(run[2] for run in runs)
        requests.append(runs[0][3] / rows)
        objects.append(runs[0][4] / rows)
        print(f"  {rows:9,} rows: {recalls[-1]:.4f} of {len(true):,} found, {seconds[-1]:.1f} s ", end="")
        print(f"({plain:.1f} s without looking for any), {1e3 * requests[-1]:.2f} requests and ", end="")
        print(f"{1e3 * objects[-1]:.2f} objects for 1,000 rows")
    slope = np.polyfit([log(rows) for rows in sizes], [log(value) for value in seconds], 1)[0]
    finish(
        {
            "least_recall": min(recalls),
            "growth_exponent": float(slope),
            "requests_a_row_last_over_first": requests[-1] / requests[0],
            "objects_a_row_last_over_first": objects[-1] / objects[0],
            "time_over_judging": seconds[-1] / plain,
        }
    )


if __name__ == "__main__":
    main()
