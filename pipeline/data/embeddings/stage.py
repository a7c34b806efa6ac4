"""CLIP embeddings of images and captions, shard by shard.

A shard's rows are encoded in batches that are cut inside the shard and padded, on one thread: neither neighbours nor
workers can change a byte of the result. Images are decoded a batch ahead, on a thread beside the encoding or by
processes of their own on any node, so a few batches of pixels are in memory at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.view import open_view
from pipeline.data.embeddings.scores import load_heads
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, read_shards, read_table
from pipeline.graph.shards import ShardTask, map_shards
from pipeline.graph.stages import Context, shard_key
from pipeline.parse import ContentFile
from pipeline.progress import Steps
from pipeline.settings import EmbeddingsSettings
from pipeline.store import Store
from pipeline.store.records import read_blob

VERSION = 5
EMBEDDED_CAPTIONS = 16  # the first ones of a row, so that a text file of 10,000 lines is not a trap
IndexRow = Mapping[str, Any]
"""A row of a shard's index (see pipeline.data.pairs.row_index)."""


@dataclass(frozen=True)
class EmbeddingsRecipe:
    """Says what is computed from CLIP's embeddings.

    Attributes:
        heads: Linear heads on the image embeddings, name: path of a safetensors file with ``weight`` [1, d] and
            ``bias`` [1].
    """

    heads: dict[str, ContentFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.heads:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"heads: {name!r} is not the name of a column; use small letters, digits and '_'")


@dataclass(frozen=True)
class DecodeBatch:
    """Reads the images of index rows, in a process that may have no torch.

    Returns their views, uint8 [n, size, size, 3], and the seconds that "read" and "decode" took.
    """

    store: Store
    size: int

    def __call__(self, images: str | None, rows: Sequence[IndexRow]) -> tuple[np.ndarray, Mapping[str, float]]:
        steps = Steps()
        with steps("read"):
            found = read_images(self.store, [Place.of(row, images) for row in rows])
        with steps("decode"):
            views = np.stack([open_view(data, self.size) for data in found])
        return views, steps.seconds


def run_embeddings(ctx: Context) -> Artifact:
    """Embeds every shard of pairs with the CLIP of the graph.

    Raises:
        UserError: for a head that cannot be used, and for settings that exclude each other.
    """
    from pipeline.data.embeddings.encoder import MakeEncoder

    settings = ctx.settings
    _check(settings)
    clip = ctx.inputs["clip"]
    heads = load_heads(ctx.store, ctx.recipe.heads, _embed_dim(ctx.store, clip.blobs))
    captions = {s.number: s for s in read_shards(ctx.store, ctx.inputs["captions"])}
    tasks = []
    rows = 0
    for pairs in read_shards(ctx.store, ctx.inputs["pairs"]):
        inputs = {"pairs": pairs, "captions": captions[pairs.number]}
        key = shard_key(ctx, {name: shard.key for name, shard in inputs.items()} | {"clip": clip.key})
        tasks.append(ShardTask(pairs.number, key, inputs))
        rows += pairs.kept
    return map_shards(ctx, tasks, MakeEncoder(ctx.store, clip.blobs, settings, heads), "rows", rows)


def _check(settings: EmbeddingsSettings) -> None:
    """Raises UserError for settings that exclude each other."""
    if settings.decoders and settings.workers == 0:
        raise UserError(
            f"run.embeddings.decoders: {settings.decoders} decode for each Ray worker, and workers is 0; raise it"
        )
    if settings.gpus not in (0, "auto") and settings.workers == 0:
        import torch

        if not torch.cuda.is_available():
            raise UserError("run.embeddings.gpus: torch finds no GPU on this machine; leave it at 0")
    if settings.decoder_nodes and not settings.decoders:
        raise UserError("run.embeddings.decoder_nodes: names nodes for decoders, and decoders is 0; raise it")


def _embed_dim(store: Store, clip: Mapping[str, str]) -> int:
    """Returns the dimension of a CLIP's embeddings, from its configuration."""
    return json.loads(read_blob(store, clip["open_clip_config.json"]))["model_cfg"]["embed_dim"]


def read_embeddings(store: Store, blob: str) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Reads the embeddings of one shard.

    Returns:
        Keys [n], embeddings of images and of first captions float16 [n, d], and their similarities float32 [n].
    """
    vectors = ("image_embedding", "text_embedding")
    table = read_table(store, blob, ["key", *vectors, "similarity"])
    flat = [table[name].combine_chunks().values.to_numpy(zero_copy_only=False) for name in vectors]
    matrices = [values.reshape(len(table), values.size // max(len(table), 1)) for values in flat]
    return table["key"].to_pylist(), matrices[0], matrices[1], table["similarity"].to_numpy()
