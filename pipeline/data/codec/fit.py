"""The two passes that fit the codec: blocks of shards to a sample of training rows, and the sample to the codec."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save
from threadpoolctl import threadpool_limits

from models.codec_fit import fit_codec
from models.folder import save_codec
from pipeline.data.codec.recipe import CodecRecipe
from pipeline.data.neighbours.blocks import (
    as_input,
    candidates,
    constants,
    cut_blocks,
    input_name,
    pass_task,
    run_pass,
)
from pipeline.errors import UserError
from pipeline.graph.artifacts import Shard, read_shards
from pipeline.graph.stages import Context
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.records import read_blob

BLOCK_ROWS = 1 << 16  # that a worker samples from; a change is a new version of the stage
METRICS = "metrics.json"  # a blob that the artefact's record takes in


@dataclass(frozen=True)
class SampleTraining:
    """Samples training rows of a block: their image embeddings float16 [n, d] and dot products with the text, fp64 [n].

    Its task's input "plan" has the number of "rows" and that of the "block", by which they are drawn.
    """

    store: Store
    seed: int

    def __call__(self, task: ShardTask) -> ShardOutput:
        images, dots, seen = [], [], 0
        for rows, image, text in candidates(self.store, task):
            training = [row["split"] == "train" for row in rows]
            images.append(image[training])
            dots.append((image[training].astype(np.float64) * text[training].astype(np.float64)).sum(1))
            seen += len(rows)
        image, dot = np.concatenate(images), np.concatenate(dots)
        given = task.inputs["plan"].counts
        random = np.random.default_rng([self.seed, given["block"]])
        chosen = np.sort(random.choice(len(dot), given["rows"], replace=False))
        chosen = chosen[np.isfinite(image[chosen]).all(1) & np.isfinite(dot[chosen])]
        return ShardOutput(Ledger(kept=seen), {"sample": save({"image": image[chosen], "dot": dot[chosen]})})


@dataclass(frozen=True)
class FitSample:
    """Fits the codec to the samples of all blocks: the files of its folder, and its metrics."""

    store: Store
    recipe: CodecRecipe

    def __call__(self, task: ShardTask) -> ShardOutput:
        parts = [load(read_blob(self.store, part.blobs["sample"])) for _, part in sorted(task.inputs.items())]
        image, dot = (torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in ("image", "dot"))
        recipe = self.recipe
        try:
            with threadpool_limits(1):  # the same order of summation wherever it runs
                fitted = fit_codec(image, dot, recipe.components, recipe.buckets, recipe.variance_target)
        except ValueError as e:
            raise UserError(f"codec: {e}") from e
        metrics = {
            "rows": len(dot),
            "requested": recipe.components,
            "components": fitted.codec.codes,
            "explained_variance_ratio": fitted.explained,
            "explained": sum(fitted.explained),
            "reconstruction_error": fitted.reconstruction_error,
            "round_trip_error": fitted.round_trip_error,
            "warnings": [fitted.warning] if fitted.warning else [],
        }
        with tempfile.TemporaryDirectory() as folder:
            save_codec(folder, fitted.codec)
            blobs = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
        return ShardOutput(Ledger(kept=1), {**blobs, METRICS: json.dumps(metrics).encode()})


def sample_training_rows(ctx: Context) -> tuple[int, list[Shard]]:
    """Returns the number of training rows, and the samples of all blocks that have training rows, in order.

    A block gives its share of ``sample_rows``. So the size of the sample is exact, and rows of all blocks are equally
    likely but for the rounding of these shares.
    """
    curated, embeddings = (read_shards(ctx.store, ctx.inputs[name]) for name in ("curation", "embeddings"))
    teaching = [shard for shard in curated if shard.counts["train/0"]]
    blocks = cut_blocks(teaching, {shard.number: shard for shard in embeddings}, BLOCK_ROWS)
    ends = [0, *accumulate(sum(shard.counts["train/0"] for shard, _ in block.shards) for block in blocks)]
    wanted = min(ends[-1], ctx.recipe.sample_rows)
    tasks = []
    for block, (start, end) in zip(blocks, pairwise(ends), strict=True):
        rows = wanted * end // ends[-1] - wanted * start // ends[-1]
        given = constants(rows=rows, block=block.number)
        tasks.append(pass_task(ctx, block.number, "sample", {**block.inputs(), "plan": given}))
    return ends[-1], run_pass(ctx, SampleTraining(ctx.store, ctx.recipe.seed), tasks, "sample")


def fit_sample(ctx: Context, sample: Sequence[Shard]) -> tuple[Ledger, Mapping[str, str], dict[str, Any]]:
    """Fits the codec in one worker. Returns the ledger, the blobs and the metrics of its artefact."""
    inputs = {input_name("sample", i): as_input(shard) for i, shard in enumerate(sample)}
    [fitted] = run_pass(ctx, FitSample(ctx.store, ctx.recipe), [pass_task(ctx, 0, "fit", inputs)], "fit", "codecs")
    blobs = dict(fitted.blobs)
    metrics = json.loads(read_blob(ctx.store, blobs.pop(METRICS)))
    return Ledger(kept=metrics["rows"]), blobs, metrics
