"""The codec of a million embeddings: its moments, the whole of it, its memory, and scikit-learn's IncrementalPCA.

Image and text embeddings of 512 components, with a spectrum that decays, lie as shards of 10,000 rows in a store in a
temporary folder. The stage's workers run on one thread of this process, and so do all others. Memory is the peak of
fresh processes, each of which fits a whole codec: to all rows, and to the same shards listed four times.
"""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.decomposition import IncrementalPCA
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.timing import begin, finish, interleave, parser, peak_memory, ratio, show
from models.codec import PCA, fit_pca, moments
from pipeline.data.codec.passes import BLOCK_ROWS, Block, cut_blocks, training_embeddings
from pipeline.data.codec.stage import VERSION, CodecRecipe, fit_components, run_codec
from pipeline.data.pairs.row_index import index_counts, index_table
from pipeline.graph.artifacts import Artifact, Shard, publish_shard, read_shards, write_shard_table, write_table
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.settings import ShardSettings
from pipeline.store import Store, open_store

WIDTH = 512
SHARD_ROWS = 10_000
SIDE = 2048  # of the matrices whose products say what this machine can do
PRODUCTS = 5


def spectrum() -> np.ndarray:
    """Rotated axes that fall as their number to the power of -0.7: fp32 [WIDTH, WIDTH]."""
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)))[0]
    return (np.arange(1, WIDTH + 1)[:, None] ** -0.7 * axes).astype(np.float32)


def embeddings(number: int, rows: int, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image and text embeddings of one shard, float16 [rows, WIDTH] of unit norm; a pair has a cosine about 0.3."""
    g = np.random.default_rng(number + 1)
    image, other = (g.standard_normal((2, rows, WIDTH), dtype=np.float32) @ axes) + np.float32(0.03)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text = 0.3 * image + other
    return image.astype(np.float16), (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float16)


def publish(store: Store, rows: int) -> dict[str, list[Shard]]:
    """Shards of curation and of embeddings, every row of which teaches."""
    import pyarrow as pa

    axes = spectrum()
    made: dict[str, list[Shard]] = {"curation": [], "embeddings": []}
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        image, text = embeddings(number, min(SHARD_ROWS, rows - start), axes)
        keys = [f"{number:08d}{i:04d}" for i in range(len(image))]
        index = [{"key": key, "status": "kept", "split": "train", "width": 64, "height": 64} for key in keys]
        columns = {
            "key": keys,
            "image_embedding": pa.FixedSizeListArray.from_arrays(pa.array(image.reshape(-1)), WIDTH),
            "text_embedding": pa.FixedSizeListArray.from_arrays(pa.array(text.reshape(-1)), WIDTH),
            "similarity": pa.array((image.astype(np.float32) * text).sum(1)),
        }
        blobs = {
            "curation": {"index": write_table(index_table(index))},
            "embeddings": {"embeddings": write_table(columns, dictionary=False)},
        }
        for stage, parts in blobs.items():
            counts = index_counts(index) if stage == "curation" else {}
            shard = publish_shard(store, stage, number, f"{stage}-{number}", Ledger(kept=len(keys)), parts, counts)
            made[stage].append(shard)
    return made


def listed(store: Store, made: dict[str, list[Shard]], times: int) -> dict[str, Artifact]:
    """The artefacts that the codec reads, with every shard in them so many times, under numbers of their own."""
    inputs = {}
    for stage, shards in made.items():
        again = [replace(s, number=s.number + i * len(shards)) for i in range(times) for s in shards]
        table, ledger = write_shard_table(store, again)
        inputs[stage] = Artifact(stage, f"{stage} {times}", {}, {}, ledger, shard_table=table)
    return inputs


@dataclass(frozen=True)
class Bench:
    """A store and what the codec reads of it. A fit leaves nothing behind."""

    store: Store
    inputs: dict[str, Artifact]
    given: frozenset[str]  # objects that were there before any fit

    @property
    def rows(self) -> int:
        return self.inputs["curation"].ledger.kept

    @property
    def blocks(self) -> list[Block]:
        return cut_blocks(*(read_shards(self.store, artifact) for artifact in self.inputs.values()), BLOCK_ROWS)

    def read(self) -> None:
        """Read all rows and convert them."""
        for block in self.blocks:
            for _ in training_embeddings(self.store, block.task(0, "").inputs, "image_embedding", "text_embedding"):
                pass

    def fit_components(self) -> PCA:
        pca = fit_components(self._context(), self.blocks, self.rows)
        self._clear()
        return pca

    def fit(self) -> Artifact:
        made = run_codec(self._context())
        self._clear()
        return made

    def _context(self) -> Context:
        recipe, settings = CodecRecipe(), ShardSettings(0)
        return Context(self.store, "codec", VERSION, "codec", recipe, settings, self.inputs, SimpleNamespace())

    def _clear(self) -> None:
        """Delete what a fit has made, so that the next one writes it again."""
        self.store.delete([entry.path for entry in self.store.list("") if entry.path not in self.given])


def peak_of_a_fit(bench: Bench) -> int:
    """Bytes that were resident at most; for a fresh process."""
    bench.fit()
    return peak_memory()


def peak(bench: Bench) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(peak_of_a_fit, bench).result()


def fit_peer(rows: np.ndarray, components: int) -> IncrementalPCA:
    """The peer in batches of its own choice."""
    return IncrementalPCA(components).fit(rows)


def check(ours: PCA, peer: IncrementalPCA) -> None:
    """Stop unless the two agree: variances, and the space of the first half of the components."""
    variance, first = peer.explained_variance_, len(ours.components) // 2
    np.testing.assert_allclose(ours.variance, variance, rtol=1e-6, atol=1e-9 * variance[0])
    cosines = np.linalg.svd(ours.components[:first].numpy() @ peer.components_[:first].T, compute_uv=False)
    np.testing.assert_allclose(cosines, 1, atol=1e-6)


def some_rows(bench: Bench, rows: int) -> Tensor:
    """The first image embeddings, fp64 [rows, WIDTH]."""
    found: list[Tensor] = []
    for block in bench.blocks:
        for (image,) in training_embeddings(bench.store, block.task(0, "").inputs, "image_embedding"):
            found.append(image)
            if sum(map(len, found)) >= rows:
                return torch.cat(found)[:rows]
    return torch.cat(found)


def fit_in_memory(shards: Sequence[np.ndarray]) -> PCA:
    """Moments and eigenvectors of shards that are read, as the first pass makes them."""
    sums = None
    for shard in shards:
        part = moments(torch.from_numpy(shard.astype(np.float64)))
        sums = part if sums is None else sums.merge(part)
    assert sums is not None
    return fit_pca(*sums)


def measure(bench: Bench, rounds: int, peer_rows: int) -> dict[str, float]:
    sample = some_rows(bench, peer_rows)
    rows = sample.numpy()
    stored = np.split(rows.astype(np.float16), range(SHARD_ROWS, len(rows), SHARD_ROWS))
    check(fit_pca(*moments(sample), k=WIDTH), fit_peer(rows, WIDTH))
    matrix = torch.randn(SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seconds = interleave(
        {
            "reading and converting": bench.read,
            "matrix products": lambda: [matrix @ matrix for _ in range(PRODUCTS)],
            f"in memory, {len(rows):,} rows": lambda: fit_in_memory(stored),
            "moments and eigenvectors": bench.fit_components,
            "codec": bench.fit,
            f"IncrementalPCA, {len(rows):,} rows": lambda: fit_peer(rows, CodecRecipe().components),
        },
        rounds,
        warmup=0,
    )
    show(seconds, 1, "s")
    in_memory, peer = (next(name for name in seconds if name.startswith(n)) for n in ("in memory", "Incremental"))
    product, row = 2 * SIDE**3 * PRODUCTS, 2 * WIDTH**2  # operations
    possible = product / median(seconds["matrix products"]) / 1e9
    print(f"  matrix products: {possible:.1f} GFLOP/s")
    return {
        "moments_rate_over_matmul": ratio(seconds, "matrix products", in_memory) * row * len(rows) / product,
        "moments_rate_with_reading_over_matmul": ratio(seconds, "matrix products", "moments and eigenvectors")
        * row
        * bench.rows
        / product,
        "codec_over_reading": ratio(seconds, "codec", "reading and converting"),
        "incremental_pca_over_moments": ratio(seconds, peer, in_memory),
    }


def measure_memory(benches: Sequence[Bench]) -> dict[str, float]:
    peaks = [peak(bench) for bench in benches]
    for bench, most in zip(benches, peaks, strict=True):
        print(f"  {bench.rows:12,} rows: at most {most / 2**20:,.0f} MiB")
    return {"memory_gib": peaks[0] / 2**30, "memory_four_times_over_once": peaks[1] / peaks[0]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=1_000_000, help="embeddings (1000000)")
    options.add_argument("--part", choices=("time", "memory"), help="only this")
    chosen = options.parse_args()
    rows = 4000 if chosen.quick else chosen.rows
    chosen.threads = 1
    begin(__doc__, chosen)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        store = open_store(folder)
        made = publish(store, rows)
        inputs = [listed(store, made, times) for times in (1, 4)]
        given = frozenset(entry.path for entry in store.list(""))
        once, four = (Bench(store, listing, given) for listing in inputs)
        if chosen.part != "memory":
            found |= measure(once, min(chosen.rounds, 3), min(rows, 125_000))
        if chosen.part != "time":
            found |= measure_memory([once, four])
    finish(found)


if __name__ == "__main__":
    main()
