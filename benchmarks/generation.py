"""Compares batches of prompts with one at a time, and a worker of ``unclip generate`` with the models alone.

The cascade of the preset tiny with random weights, one thread, as workers have. The prior alone, with the decoder (64
px), and all of it to 1024 px; a worker also reads prompts, encodes PNG files, scores pictures with CLIP, and writes a
shard.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.timing import begin, finish, interleave, parser, ratio, show
from benchmarks.tiny import generator
from models.cascade import UnCLIP
from models.tokens import tokenize
from pipeline.graph.artifacts import ShardRow, publish_shard, write_table
from pipeline.graph.workers import ShardTask
from pipeline.sampling.generation import STAGE, GenerationRecipe, Generator
from pipeline.store import Store, open_store
from pipeline.store.records import put_blob

BATCH = 8
Prompts = list[str]


def draw_embeddings(unclip: UnCLIP, prompts: Prompts, size: int) -> None:
    """Draws image embeddings of prompts, ``size`` at once."""
    with torch.no_grad():
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            tokens = tokenize(part)
            unclip.draw_embedding(tokens, unclip.clip.encode_text(tokens), list(range(size)), unclip.sampling)


def sample(unclip: UnCLIP, prompts: Prompts, size: int, side: int) -> None:
    """Draws images of prompts, ``size`` at once."""
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        unclip.generate(part, list(range(start, start + len(part))), size=side)


class Shards:
    """Returns a shard of the same prompts again and again, each under a key of its own."""

    def __init__(self, store: Store, unclip: UnCLIP, prompts: Prompts, side: int):
        keys = [f"{i:010d}" for i in range(len(prompts))]
        rows = {"key": keys, "prompt": prompts, "seed": list(range(len(prompts))), "reject": [None] * len(prompts)}
        blob = put_blob(store, write_table(rows))
        self.store, self.made = store, 0
        self.inputs = {"prompts": ShardRow(0, blob, len(prompts), 0, {"prompts": blob}, {})}
        self.worker = Generator(store, unclip, GenerationRecipe({"size": side}, BATCH))

    def __call__(self) -> None:
        task = ShardTask(0, f"{self.made:064d}", self.inputs)
        output = self.worker(task)
        publish_shard(self.store, STAGE, 0, task.key, output.ledger, output.blobs, output.counts)
        self.made += 1


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__)
    options.set_defaults(rounds=3, threads=1)
    chosen = options.parse_args()
    begin(__doc__, chosen)
    unclip = generator("nano" if chosen.quick else "tiny")
    many = [f"a picture of number {i}" for i in range(BATCH if chosen.quick else 4 * BATCH)]
    few, side = many[:BATCH], 64 if chosen.quick else 1024
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(open_store(str(Path(folder))), unclip, few, side)
        seconds = interleave(
            {
                f"{len(many)} embeddings, {BATCH} at once": partial(draw_embeddings, unclip, many, BATCH),
                f"{len(many)} embeddings, one by one": partial(draw_embeddings, unclip, many, 1),
                f"{BATCH} of 64 px at once": partial(sample, unclip, few, BATCH, 64),
                f"{BATCH} of 64 px, one by one": partial(sample, unclip, few, 1, 64),
                f"{BATCH} of the largest at once": partial(sample, unclip, few, BATCH, side),
                f"a shard of {BATCH} by a worker": shards,
            },
            1 if chosen.quick else chosen.rounds,
        )
    show(seconds, 1, "s")
    prior, prior_one, small, small_one, whole, worker = seconds
    finish(
        {
            "prior_batch_over_one": ratio(seconds, prior_one, prior),
            "decoder_batch_over_one": ratio(seconds, small_one, small),
            "worker_rate_over_models": ratio(seconds, whole, worker),
        }
    )


if __name__ == "__main__":
    main()
