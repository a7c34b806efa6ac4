"""Plants near-duplicates among random embeddings; measures how many curation finds and how its time grows.

Vectors of 512 components are spread evenly: they have no clusters. A tenth of the rows are planted: each has a cosine,
spread evenly from the bound to 1, with a row of the first half. Shards of 1,000 rows are curated by the stage itself,
in this process, from and to a store in a temporary folder; exact search is faiss's flat index, with verdicts in fp64.
"""

import tempfile
from math import log
from statistics import median
from time import perf_counter

import numpy as np

from benchmarks.timing import begin, finish, parser
from pipeline.data.curation.stage import CurationRecipe, run_curation
from pipeline.data.pairs.row_index import index_counts, index_table
from pipeline.graph.artifacts import (
    Artifact,
    Shard,
    publish_shard,
    read_shards,
    read_table,
    write_shard_table,
    write_table,
)
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.settings import ShardSettings
from pipeline.store import Store, open_store

WIDTH = 512
BOUND = 0.96
SHARD_ROWS = 1000


def planted(rows: int) -> np.ndarray:
    """Returns random unit vectors, float16 [rows, WIDTH]; a tenth, in the second half, are near one of the first."""
    g = np.random.default_rng(rows)
    vectors = g.standard_normal((rows, WIDTH), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    later = g.choice(np.arange(rows // 2, rows), rows // 10, replace=False)
    near = vectors[g.integers(0, rows // 2, rows // 10)]
    cosine = g.uniform(BOUND, 1, (rows // 10, 1)).astype(np.float32)
    aside = g.standard_normal(near.shape, dtype=np.float32)
    aside -= (aside * near).sum(1, keepdims=True) * near
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    vectors[later] = cosine * near + np.sqrt(1 - cosine**2) * aside
    return vectors.astype(np.float16)


def exact(vectors: np.ndarray) -> set[int]:
    """Returns the rows with an earlier row near them."""
    import faiss

    index = faiss.IndexFlatIP(WIDTH)
    found: set[int] = set()
    for start in range(0, len(vectors), 4096):
        block = vectors[start : start + 4096].astype(np.float32)
        index.add(block)
        limits, _, ids = index.range_search(block, BOUND - 1e-3)
        rows = np.repeat(np.arange(start, start + len(block)), np.diff(limits).astype(np.int64))
        earlier = ids < rows
        a, b = rows[earlier], ids[earlier]
        near = (vectors[a].astype(np.float64) * vectors[b].astype(np.float64)).sum(1) >= BOUND
        found |= set(a[near].tolist())
    return found


def publish(store: Store, vectors: np.ndarray) -> dict[str, Artifact]:
    """Publishes the artefacts that curation reads, of training rows with sound captions and images."""
    import pyarrow as pa

    made: dict[str, list[Shard]] = {"pairs": [], "captions": [], "embeddings": []}
    for number, start in enumerate(range(0, len(vectors), SHARD_ROWS)):
        block = vectors[start : start + SHARD_ROWS]
        keys = [f"{number:08d}{i:04d}" for i in range(len(block))]
        rows = [{"key": key, "status": "kept", "split": "train", "width": 64, "height": 64} for key in keys]
        column = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), WIDTH)
        similarity = pa.array(np.ones(len(block), np.float32))
        tables = {
            "pairs": ("index", index_table(rows)),
            "captions": ("captions", {"key": keys, "captions": [["a caption"]] * len(block)}),
            "embeddings": (
                "embeddings",
                {"key": keys, "image_embedding": column, "text_embedding": column, "similarity": similarity},
            ),
        }
        for stage, (name, table) in tables.items():
            counts = index_counts(rows) if stage == "pairs" else {}
            blobs = {name: write_table(table, dictionary=False)}
            made[stage].append(
                publish_shard(store, stage, number, f"{stage}-{number}", Ledger(kept=len(block)), blobs, counts)
            )
    return {
        stage: Artifact(
            stage, stage, {}, {}, Ledger(kept=len(vectors)), shard_table=write_shard_table(store, shards)[0]
        )
        for stage, shards in made.items()
    }


def curate(store: Store, inputs: dict[str, Artifact], bound: float | None) -> tuple[float, set[int]]:
    """Returns the seconds of curation, and the rows that it rejects."""
    recipe = CurationRecipe(near_duplicate=bound, near_held_out=None)
    ctx = Context(store, "curation", 1, f"bound-{bound}", recipe, ShardSettings(0), inputs)
    start = perf_counter()
    made = run_curation(ctx)
    seconds = perf_counter() - start
    found = set()
    for shard in read_shards(store, made):
        keys = read_table(store, shard.blobs["rejected"], ["key"])["key"].to_pylist()
        found |= {shard.number * SHARD_ROWS + int(key[8:]) for key in keys}
    return seconds, found


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[50_000, 100_000, 200_000], help="sizes, rising")
    chosen = options.parse_args()
    sizes = [2000, 4000] if chosen.quick else chosen.rows
    begin(__doc__, chosen)
    recalls, seconds, plain = [], [], []
    for rows in sizes:
        vectors = planted(rows)
        true = exact(vectors)
        runs = []
        for _ in range(1 if chosen.quick else min(chosen.rounds, 3)):
            with tempfile.TemporaryDirectory() as folder:
                store = open_store(folder)
                inputs = publish(store, vectors)
                runs.append((curate(store, inputs, BOUND), curate(store, inputs, None)[0]))
        found = runs[0][0][1]
        assert all(run[0][1] == found for run in runs), "two runs of one list found different rows"
        assert found <= true, "a row was rejected that has no earlier row near it"
        recalls.append(len(found) / len(true))
        seconds.append(median(run[0][0] for run in runs))
        plain.append(median(run[1] for run in runs))
        print(
            f"  {rows:9,} rows: {len(found):,} of {len(true):,} found ({recalls[-1]:.4f}), {seconds[-1]:.1f} s; ",
            end="",
        )
        print(f"without looking for any {plain[-1]:.1f} s")
    slope = np.polyfit([log(rows) for rows in sizes], [log(value) for value in seconds], 1)[0]
    finish(
        {"least_recall": min(recalls), "growth_exponent": float(slope), "time_over_judging": seconds[-1] / plain[-1]}
    )


if __name__ == "__main__":
    main()
