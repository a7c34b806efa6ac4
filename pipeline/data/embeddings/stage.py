"""CLIP embeddings of images and captions, shard by shard.

A shard's rows are encoded in batches that are cut inside the shard and padded, on one thread: neither neighbours nor
workers can change a byte of the result. Images are decoded and captions tokenized a part of a shard ahead, on a thread
beside the encoding or by processes of their own on any node, so a few parts are in memory at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from pipeline.data.embeddings.parts import parts_for
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, read_shards
from pipeline.graph.shards import map_shards
from pipeline.graph.stages import Context, Stage, shard_key
from pipeline.graph.workers import ShardTask, Streamed
from pipeline.parse import ContentFile
from pipeline.settings import EmbeddingsSettings

PART_BYTES = 64 << 20  # of the views of a part that a thread decodes beside the encoding
TASK_BYTES = 512 << 20  # of the views that a decoder makes at once, in its memory and then in Ray's object store


@dataclass(frozen=True)
class EmbeddingsRecipe:
    """Says how CLIP computes, and what is computed from its embeddings.

    Attributes:
        precision: Precision on a GPU that supports bf16: ``bf16``, for which the record has the error of cosines
            against fp32, or ``fp32``. A CPU always computes in fp32.
        heads: Linear heads on the image embeddings: name to path of a safetensors file with ``weight`` [1, d] and
            ``bias`` [1].
    """

    precision: Literal["bf16", "fp32"] = "bf16"
    heads: dict[str, ContentFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.heads:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"heads: {name!r} is not the name of a column; use small letters, digits and '_'")


def run_embeddings(ctx: Context) -> Artifact:
    """Embeds every shard of pairs with the CLIP of the graph.

    Raises:
        UserError: for a head that cannot be used, and for settings that exclude each other.
    """
    from pipeline.data.embeddings.encoder import OpenEncoder, embedding_metrics

    settings = ctx.settings
    _check(settings)
    clip = ctx.inputs["clip"]
    opened = OpenEncoder(ctx.store, clip.blobs, settings.batch, settings.gpus, ctx.recipe.precision == "bf16")
    parts, large = (
        parts_for(ctx.store, clip.blobs, settings.batch, ctx.recipe.heads, size) for size in (PART_BYTES, TASK_BYTES)
    )
    captions = {s.number: s for s in read_shards(ctx.store, ctx.inputs["captions"])}
    tasks = []
    rows = 0
    for pairs in read_shards(ctx.store, ctx.inputs["pairs"]):
        inputs = {"pairs": pairs, "captions": captions[pairs.number]}
        key = shard_key(ctx, {name: shard.key for name, shard in inputs.items()} | {"clip": clip.key})
        tasks.append(ShardTask(pairs.number, key, inputs))
        rows += pairs.kept
    alone, make = (Streamed(each.count, each.prepare, opened, each.join) for each in (parts, large))
    make = replace(make, alone=alone)
    return map_shards(ctx, tasks, make, "rows", rows, measure=partial(embedding_metrics, ctx, opened, parts))


def _check(settings: EmbeddingsSettings) -> None:
    """Raises UserError for settings that exclude each other."""
    if settings.decoders not in (0, "auto") and settings.workers == 0:
        raise UserError(
            f"run.embeddings.decoders: {settings.decoders} decoders for each Ray worker, but workers is 0; raise "
            "workers"
        )
    if settings.gpus not in (0, "auto") and settings.workers == 0:
        import torch

        if not torch.cuda.is_available():
            raise UserError("run.embeddings.gpus: torch finds no GPU on this machine; set it to 0")
    if settings.decoder_nodes and settings.decoders in (0, "auto"):
        raise UserError(f"run.embeddings.decoder_nodes: needs decoders, which is {settings.decoders}; raise it")


EMBEDDINGS = Stage(
    "embeddings",
    version=5,
    recipe=EmbeddingsRecipe,
    inputs=("pairs", "captions", "clip"),
    run=run_embeddings,
    settings=EmbeddingsSettings,
    row_bytes=lambda recipe, rows, dim: 4 * dim,  # two in float16
)
