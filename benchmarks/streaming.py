"""Measures how busy four nodes of cores keep one encoder on a node of its own, by the stream of the embeddings stage.

Decoders and encoder only sleep, and hand on as many bytes as views have: so one machine plays all nodes, and what is
measured is Ray's stream.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.timing import begin, finish, parser
from pipeline.graph.shards import map_shards
from pipeline.graph.stages import Context
from pipeline.graph.workers import ShardOutput, ShardTask, Streamed, Timed
from pipeline.ledger import Ledger
from pipeline.settings import EmbeddingsSettings
from pipeline.store import open_store

NODES = 4
MEMORY = 200 << 20  # of each node's object store
BYTES = 8 << 20  # of a part
PARTS = 3  # of a shard


@dataclass(frozen=True)
class NoRecipe:
    """The recipe of a stage that only sleeps."""


class Sleeper:
    """Decodes and encodes by sleeping, and notes when each part was encoded."""

    def __init__(self, folder: str, decode_s: float, encode_s: float):
        self.folder, self.decode_s, self.encode_s = folder, decode_s, encode_s

    def decode(self, task: ShardTask, part: int) -> Timed:
        """Returns the views of a part after a while."""
        time.sleep(self.decode_s)
        return np.zeros(BYTES, np.uint8), {"decode": self.decode_s}

    def open(self) -> "Sleeper":
        """Returns itself, in the process of the encoder."""
        return self

    def __call__(self, task: ShardTask, part: int, views: np.ndarray) -> Timed:
        """Sleeps as long as an encoder computes."""
        time.sleep(self.encode_s)
        with open(f"{self.folder}/encoded", "a") as file:
            file.write(f"{time.time()}\n")
        return len(views), {"encode": self.encode_s}

    def join(self, task: ShardTask, made: Sequence[int]) -> ShardOutput:
        """Makes a shard that says how many bytes there were."""
        return ShardOutput(Ledger(kept=sum(made)), {"data": b"x"})


def measure(options: argparse.Namespace, folder: str) -> dict[str, float]:
    """Returns the share of its time that the encoder computed, between its tenth part and its last.

    "driver_ms_per_part" are milliseconds of a core that this process, Ray's driver, took for each part, its start-up
    included.
    """
    import ray
    from ray.cluster_utils import Cluster

    decoders = NODES * options.cores
    sleeper = Sleeper(folder, options.encode_s * decoders * options.slack, options.encode_s)
    settings = EmbeddingsSettings(
        workers=1, gpus=1, nodes={"part": "encode"}, decoders=decoders, decoder_nodes={"part": "decode"}
    )
    node: dict[str, Any] = {"object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(NODES):
            cluster.add_node(**node, num_cpus=options.cores, labels={"part": "decode"})
        cluster.add_node(**node, num_cpus=1, num_gpus=1, labels={"part": "encode"})
        os.environ["RAY_ADDRESS"] = cluster.address
        ctx = Context(open_store(f"{folder}/store"), "embeddings", 1, "key", NoRecipe(), settings, {})
        tasks = [ShardTask(number, f"shard-{number}", {}) for number in range(options.shards)]
        began = time.process_time()
        map_shards(ctx, tasks, Streamed(lambda task: PARTS, sleeper.decode, sleeper.open, sleeper.join))
        driver = time.process_time() - began
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)
    times = sorted(map(float, Path(folder, "encoded").read_text().split()))[10:]
    busy = (len(times) - 1) * options.encode_s / (times[-1] - times[0])
    return {"encoder_busy": busy, "driver_ms_per_part": 1e3 * driver / PARTS / options.shards}


def main() -> None:
    """Runs the benchmark."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--shards", type=int, default=60, help="shards of three parts each (60)")
    options_parser.add_argument("--cores", type=int, default=2, help="decoders on each of the four nodes (2)")
    options_parser.add_argument("--encode-s", type=float, default=0.25, help="seconds that a part is encoded (0.25)")
    options_parser.add_argument("--slack", type=float, default=0.8, help="decoders' time over the encoder's (0.8)")
    options = options_parser.parse_args()
    begin(__doc__, options)
    if options.quick:
        options.shards, options.encode_s = 8, 0.02
    with TemporaryDirectory() as folder:
        finish(measure(options, folder))


if __name__ == "__main__":
    main()
