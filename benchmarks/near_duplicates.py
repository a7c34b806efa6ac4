"""Plants near-duplicates among random embeddings; measures how many curation finds, and how what it takes grows.

Vectors are spread evenly: they have no clusters. A tenth of the rows are planted: each has a cosine, spread evenly from
the bound to 1, with a row of the first half. Shards of 1,000 rows are curated by the stage itself, in this process, in
a store in a temporary folder, which counts requests and objects. Exact search compares 20,000 rows of the second half
with all rows before them, with verdicts in fp64. Times are those of a core, on one thread as a worker has it: what else
the machine does hardly counts.
"""

import tempfile
from dataclasses import dataclass
from math import log
from statistics import median
from time import process_time

import numpy as np
from threadpoolctl import threadpool_limits

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
    start = process_time()
    with threadpool_limits(1):
        made = curate(store, inputs, near_duplicate=bound, near_held_out=None)
    return process_time() - start, made


@dataclass(frozen=True)
class Curated:
    """What curation of one list found and took.

    Attributes:
        rows: Rejected rows.
        seconds: Seconds of a core.
        plain: Seconds of a core without looking for near rows; 0 where it was not measured.
        requests: Objects that were read, or parts of them.
        objects: Objects that were made.
    """

    rows: set[int]
    seconds: float
    plain: float
    requests: int
    objects: int


def measure(vectors: np.ndarray, plain: bool = True) -> Curated:
    """Curates a list, and once more without looking for near rows if ``plain``."""
    lists.SHARD_ROWS = SHARD_ROWS
    with tempfile.TemporaryDirectory() as folder:
        store = CountedStore(open_store(folder))
        inputs = publish(store, Listed(vectors, ["train"] * len(vectors), [64] * len(vectors)))
        seconds, made = timed(store, inputs, BOUND)
        taken = len(store.read_paths), len(store.created)
        rows = {int(row.key[:8]) * SHARD_ROWS + int(row.key[8:]) for row in rejected(store, made)}
        return Curated(rows, seconds, timed(store, inputs, None)[0] if plain else 0.0, *taken)


def listed(rows: int, width: int) -> np.ndarray:
    """Returns the embeddings of a list, float16 [rows, width]."""
    return planted(rows, width, rows // 10, rows, BOUND)[0]


def compare(rows: int, width: int, rounds: int, plain: bool = True) -> tuple[float, list[Curated]]:
    """Returns the share of near-duplicates that curation finds of those of exact search, and each round's figures."""
    vectors = listed(rows, width)
    half = np.arange(rows // 2, rows)
    asked = np.sort(np.random.default_rng(rows).choice(half, min(ASKED, len(half)), replace=False))
    true = exact(vectors, asked)
    runs = [measure(vectors, plain) for _ in range(rounds)]
    found = runs[0].rows
    assert all(run.rows == found for run in runs), "two runs of one list found different rows"
    assert found & set(asked.tolist()) <= true, "a row was rejected that has no earlier row near it"
    recall = len(found & true) / len(true)
    seconds, without = (median(getattr(run, name) for run in runs) for name in ("seconds", "plain"))
    print(f"  {rows:9,} rows: {recall:.4f} of {len(true):,} found, {seconds:.1f} s ", end="")
    print(f"({without:.1f} s without looking for any), {1e3 * runs[0].requests / rows:.2f} requests and ", end="")
    print(f"{1e3 * runs[0].objects / rows:.2f} objects for 1,000 rows", flush=True)
    return recall, runs


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[100_000, 200_000, 400_000], help="sizes, rising")
    options.add_argument("--width", type=int, default=32, help="components; pairs of few are harder to find (32)")
    chosen = options.parse_args()
    sizes = [20_000, 40_000] if chosen.quick else chosen.rows
    begin(__doc__, chosen)
    recalls, seconds, requests, objects, plain = [], [], [], [], 0.0
    for rows in sizes:
        recall, runs = compare(rows, chosen.width, 1 if chosen.quick else min(chosen.rounds, 3))
        recalls.append(recall)
        seconds.append(median(run.seconds for run in runs))
        plain = median(run.plain for run in runs)
        requests.append(runs[0].requests / rows)
        objects.append(runs[0].objects / rows)
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
