"""How downloading and the scheduling of embeddings grow with the nodes of a cluster: one, two and four.

Nodes are raylets on this machine with one core each and no room on the head, and a stage has a worker on each. Pictures
come from a server that waits 200 ms before each answer, on 16 threads a node; they are small, so that waiting and not
the processor is the bound. The encoder of the embeddings is a fake that sleeps: what it shows is scheduling only, with
reading, decoding and publishing around it. Rates are those of the middle of a run, when all workers are at work.
"""

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.pairs import DELAY_S, SMALL, Site, make_pictures, ours, serving
from benchmarks.pictures import make_shard, random_fields
from benchmarks.timing import begin, finish, parser
from models.presets import PRESETS
from pipeline.data.embeddings.stage import DecodeBatch, EmbeddingsRecipe, Encoder
from pipeline.graph.artifacts import read_shards
from pipeline.graph.shards import ShardOutput, ShardTask, map_shards
from pipeline.graph.stages import Context
from pipeline.settings import EmbeddingsSettings, RaySettings
from pipeline.store import Store, open_store
from pipeline.store.records import read_blob

NODES = (1, 2, 4)
MEMORY = 100 << 20
BATCH, SLEEP_S = 16, 0.8  # of a batch of pictures


@contextmanager
def cluster(nodes: int) -> Iterator[None]:
    """A cluster of so many nodes, to which everything inside connects."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=1, object_store_memory=MEMORY)
        os.environ["RAY_ADDRESS"] = made.address
        yield
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        ray.shutdown()
        made.shutdown()


def download(site: Site, nodes: int, shards: int, shard_rows: int) -> float:
    """Pictures a second of the pairs stage, by the server's clock."""
    with tempfile.TemporaryDirectory() as folder:
        run, _ = ours(site, Path(folder), shards * nodes * shard_rows, shard_rows, nodes)
    return run.rate


# --- embeddings, as far as scheduling goes ----------------------------------------------------------------------------


class SleepingClip:
    """As much of a CLIP as the encoder of the stage asks for; it sleeps where a real one computes."""

    def __init__(self) -> None:
        import torch

        from models.clip import Clip

        real = Clip.build(PRESETS["nano"]["clip"], seed=0)
        self.tokenize, self.text_lengths, self.mean = real.tokenize, real.text_lengths, real.mean
        self.image_size, self.embed_dim = real.image_size, real.embed_dim
        self.torch = torch

    def encode_image(self, pixels: Any) -> Any:
        time.sleep(SLEEP_S)
        return self.torch.zeros(len(pixels), self.embed_dim)

    def encode_text(self, tokens: Any) -> Any:
        return self.torch.zeros(len(tokens), self.embed_dim)


@dataclass(frozen=True)
class MakeSleeper:
    """Opens the stage's own encoder with the fake CLIP, and notes when each shard was done."""

    store: Store

    def __call__(self) -> Any:
        from concurrent.futures import ThreadPoolExecutor

        import torch

        torch.set_num_threads(1)
        clip = SleepingClip()
        submit = partial(ThreadPoolExecutor(1).submit, DecodeBatch(self.store, clip.image_size))
        encoder = Encoder(self.store, clip, BATCH, {}, submit, 1)

        def work(task: ShardTask) -> ShardOutput:
            made = encoder(task)
            blobs: Mapping[str, bytes] = {**made.blobs, "done": repr(time.time()).encode()}
            return ShardOutput(made.ledger, blobs)

        return work


def embed(nodes: int, shards: int, rows: int) -> float:
    """Pictures a second of workers that sleep, by the times at which shards of the middle were done."""
    fields = random_fields(8, 1024)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        tasks = [make_shard(store, number, rows, fields) for number in range(shards * nodes)]
        settings = EmbeddingsSettings(workers=nodes, batch=BATCH)
        config = SimpleNamespace(run=SimpleNamespace(ray=RaySettings()))
        ctx = Context(store, "embeddings", 1, "scheduling-only", EmbeddingsRecipe(), settings, {}, config)
        made = map_shards(ctx, tasks, MakeSleeper(store), "rows", rows * len(tasks))
        times = np.sort([float(read_blob(store, shard.blobs["done"])) for shard in read_shards(store, made)])
    first, last = len(times) * 3 // 8, len(times) * 7 // 8
    return rows * (last - first) / float(times[last] - times[first])


def show(name: str, rates: Mapping[int, list[float]]) -> None:
    for nodes, found in rates.items():
        print(f"  {name}, {nodes} node{'s' * (nodes > 1)}: ", end="")
        print(f"{median(found):.1f} pictures/s ({min(found):.1f} to {max(found):.1f})")


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.set_defaults(rounds=3, threads=1)
    chosen = options_parser.parse_args()
    begin(__doc__, chosen)
    logging.getLogger("ray").setLevel(logging.ERROR)
    sizes = (1, 2) if chosen.quick else NODES
    downloaded: dict[int, list[float]] = {nodes: [] for nodes in sizes}
    embedded: dict[int, list[float]] = {nodes: [] for nodes in sizes}
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder), SMALL, 8 if chosen.quick else 32)
        with serving(Path(folder), DELAY_S) as site:
            for number in range(chosen.rounds):
                for nodes in sizes if number % 2 else reversed(sizes):
                    with cluster(nodes):
                        downloaded[nodes].append(download(site, nodes, 4, 20 if chosen.quick else 300))
                        embedded[nodes].append(embed(nodes, 8, BATCH if chosen.quick else 2 * BATCH))
    show(f"download, {DELAY_S * 1e3:.0f} ms to wait", downloaded)
    show("embeddings, scheduling only", embedded)
    ratios = {}
    for name, rates in (("download", downloaded), ("embeddings_scheduling_only", embedded)):
        for nodes in sizes[1:]:
            pairs = zip(rates[nodes], rates[1], strict=True)
            ratios[f"{name}_{nodes}_nodes_over_1"] = median(a / b for a, b in pairs)
    finish(ratios)


if __name__ == "__main__":
    main()
