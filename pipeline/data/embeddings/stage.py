"""CLIP image and text embeddings, shard by shard.

A shard's rows are encoded in batches that are cut inside the shard and padded, on one thread, so that neither
neighbours nor workers can change a byte of the result. Pictures are decoded a batch ahead, on a thread beside the
encoding or by processes of their own on any node; of a shard there are never more pixels than a few batches.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.data.embeddings.scores import Head, load_heads, score_column
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.data.source.imported import SCHEME, read_imported
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import Artifact
from pipeline.graph.shard_tables import read_shards, read_table, write_table
from pipeline.graph.shards import Helpers, ShardOutput, ShardTask, map_shards
from pipeline.graph.stages import Context, shard_key
from pipeline.ledger import Ledger
from pipeline.parse import ContentFile
from pipeline.progress import Steps, add
from pipeline.settings import EmbeddingsSettings
from pipeline.store import Store
from pipeline.store.parallel import in_order
from pipeline.store.records import materialise, read_blob

VERSION = 5
CAPTIONS = 16  # of a row that are embedded, the first ones, so that a text file of 10,000 lines is no trap


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
                raise ValueError(f"heads: {name!r} is no name of a column; use small letters, digits and '_'")


@dataclass(frozen=True)
class DecodeBatch:
    """Reads the pictures of index rows and gives their views, uint8 [n, size, size, 3], and the seconds that "read" and
    "decode" took. Needs no torch."""

    store: Store
    size: int

    def __call__(self, images: str | None, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, Mapping[str, float]]:
        import numpy as np

        from models.view import open_view

        steps = Steps()
        with steps("read"):
            found = read_images(self.store, [Place.of(row, images) for row in rows])
        with steps("decode"):
            views = np.stack([open_view(data, self.size) for data in found])
        return views, steps.seconds


@dataclass(frozen=True)
class MakeEncoder:
    """Opens CLIP once in each worker process."""

    store: Store
    clip: Mapping[str, str]
    settings: EmbeddingsSettings
    heads: Mapping[str, Head]

    def __call__(self) -> Encoder:
        import tempfile

        import torch

        from models.clip import Clip

        torch.set_num_threads(1)
        if self.settings.gpus:  # a GPU would convolve in TF32, and that is more than rounding
            torch.backends.cudnn.allow_tf32 = False
        with tempfile.TemporaryDirectory() as folder:
            materialise(self.store, self.clip, folder)
            clip = Clip.from_folder(folder).eval()
        decode, helpers = DecodeBatch(self.store, clip.image_size), self.settings.decoders
        submit: Callable[..., Future[Any]] = ThreadPoolExecutor(1).submit
        submit = Helpers(decode, helpers, self.settings.decoder_nodes).submit if helpers else partial(submit, decode)
        device = "cuda" if self.settings.gpus else "cpu"
        return Encoder(self.store, clip.to(device), self.settings.batch, self.heads, submit, max(helpers, 1))


class Encoder:
    """Embeds the kept rows of one shard, and scores them. ``submit`` has a batch decoded, ``ahead`` of them in advance.

    Columns: "key", "image_embedding" and "text_embedding" (float16 [d], unit norm, of the first caption),
    "more_text_embeddings" (a list of them, of the captions after it), "similarity" (cosine of the first two), "width"
    and "height" of the stored picture in pixels (null where embeddings are imported), "caption_length" (of the first,
    in characters), and "score_NAME" of every head.
    """

    def __init__(
        self,
        store: Store,
        clip: Any,
        batch: int,
        heads: Mapping[str, Head],
        submit: Callable[..., Future[Any]],
        ahead: int,
    ):
        self.store, self.clip, self.batch, self.heads = store, clip, batch, heads
        self.submit, self.ahead = submit, ahead

    def __call__(self, task: ShardTask) -> ShardOutput:
        import numpy as np
        import pyarrow as pa

        steps = Steps()
        pairs, captions = task.inputs["pairs"], task.inputs["captions"]
        with steps("read"):
            rows = [r for r in read_table(self.store, pairs.blobs["index"]).to_pylist() if r["status"] == "kept"]
            texts = dict(zip(*read_table(self.store, captions.blobs["captions"]).to_pydict().values(), strict=True))
        came = np.array([r["url"].startswith(SCHEME) for r in rows], bool)  # embedded, with one caption
        told = [texts[r["key"]][: 1 if given else CAPTIONS] or [""] for r, given in zip(rows, came, strict=True)]
        image, text = np.zeros((2, len(rows), self.clip.embed_dim), np.float32)
        pictured = [rows[i] for i in np.flatnonzero(~came)]
        blocks = [pictured[i : i + self.batch] for i in range(0, len(pictured), self.batch)]
        views = in_order(partial(self.submit, pairs.blobs.get("images")), blocks, self.ahead)
        image[came], text[came] = self._imported([rows[i] for i in np.flatnonzero(came)])
        with steps("encode"):
            text[~came] = self._texts([told[i][0] for i in np.flatnonzero(~came)])
            # In batches of their own, so that they cannot change a byte of the first ones.
            more = self._texts([caption for captions in told for caption in captions[1:]])
        image[~came] = self._images(views, len(pictured), steps)
        offsets = np.cumsum([0, *(len(captions) - 1 for captions in told)], dtype=np.int32)
        columns = {
            "key": pa.array([r["key"] for r in rows], pa.string()),
            "image_embedding": _column(image),
            "text_embedding": _column(text),
            "more_text_embeddings": pa.ListArray.from_arrays(pa.array(offsets), _column(more)),
        }
        columns["similarity"] = pa.array((image * text).sum(1).astype(np.float32))
        columns |= {name: pa.array([r[name] for r in rows], pa.int32()) for name in ("width", "height")}
        columns["caption_length"] = pa.array([len(captions[0]) for captions in told], pa.int32())
        columns |= {score_column(name): pa.array(head(image)) for name, head in self.heads.items()}
        with steps("pack"):
            data = write_table(columns, dictionary=False)
        return ShardOutput(Ledger(kept=len(rows)), {"embeddings": data}, seconds=steps.seconds)

    def _imported(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
        """Image and text embeddings, fp32 [n, d] of unit norm, from where they lie.

        Raises CorruptObject where they have changed, UserError where they are not this CLIP's.
        """
        import numpy as np

        found = read_imported([r["url"] for r in rows])
        for row, pair in zip(rows, found, strict=True):
            if isinstance(pair, str) or hashlib.sha256(pair.tobytes()).hexdigest() != row["sha256"]:
                raise CorruptObject(
                    row["url"], f"the embedding of row {row['key']} has other values than the index says"
                )
            if pair.shape[1] != self.clip.embed_dim:
                raise UserError(
                    f"source: {row['url']} has {pair.shape[1]} dimensions, and the embeddings of clip.weights have "
                    f"{self.clip.embed_dim}: name there the CLIP that made them"
                )
        stacked = np.array(found, np.float32).reshape(-1, 2, self.clip.embed_dim)
        unit = stacked / np.linalg.norm(stacked, axis=2, keepdims=True)
        return unit[:, 0], unit[:, 1]

    def _images(self, views: Iterator[tuple[Any, Mapping[str, float]]], count: int, steps: Steps) -> Any:
        """Embeddings of ``count`` pictures, whose views come in batches, all full but for the last one."""
        import numpy as np

        size = self.clip.image_size
        result = np.zeros((count, self.clip.embed_dim), np.float32)
        for start in range(0, count, self.batch):
            with steps("views"):
                block, seconds = next(views)
            add(steps.seconds, seconds)
            pixels = np.zeros((self.batch, 3, size, size), np.uint8)
            pixels[: len(block)] = block.transpose(0, 3, 1, 2)
            with steps("encode"):
                result[start : start + len(block)] = self._encode(self.clip.encode_image, pixels)[: len(block)]
        return result

    def _texts(self, texts: Sequence[str]) -> Any:
        """Embeddings of captions, each in a batch of the shortest length that holds it: that hangs on no neighbour."""
        import numpy as np

        from models.tokens import text_ends

        result = np.zeros((len(texts), self.clip.embed_dim), np.float32)
        if not texts:
            return result
        tokens, (empty,) = self.clip.tokenize(texts), self.clip.tokenize([""]).numpy()
        lengths = self.clip.text_lengths
        fitting = np.searchsorted(lengths[:-1], text_ends(tokens).numpy())  # the last one holds all
        tokens = tokens.numpy()
        for number, length in enumerate(lengths):
            rows = np.flatnonzero(fitting == number)
            length = length if number < len(lengths) - 1 else tokens.shape[1]
            for start in range(0, len(rows), self.batch):
                block = rows[start : start + self.batch]
                padded = np.tile(empty[:length], (self.batch, 1))
                padded[: len(block)] = tokens[block, :length]
                result[block] = self._encode(self.clip.encode_text, padded)[: len(block)]
        return result

    def _encode(self, encode: Any, batch: Any) -> Any:
        import torch

        with torch.no_grad():
            return encode(torch.from_numpy(batch).to(self.clip.mean.device)).float().cpu().numpy()


def _column(embeddings: Any) -> Any:
    """Embeddings [n, d] as a column of float16 lists of one length."""
    import numpy as np
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(embeddings.astype(np.float16).reshape(-1)), embeddings.shape[1])


def run_embeddings(ctx: Context) -> Artifact:
    """Embed every shard of pairs with the CLIP of the graph.

    Raises UserError for a head that cannot be used, and for settings that do not go together.
    """
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
    if settings.decoders and not settings.workers:
        raise UserError(
            f"run.embeddings.decoders: {settings.decoders} decode for each Ray worker, and workers is 0; raise it"
        )
    if settings.gpus and not settings.workers:
        import torch

        if not torch.cuda.is_available():
            raise UserError("run.embeddings.gpus: torch finds no GPU on this machine; leave it at 0")
    if settings.decoder_nodes and not settings.decoders:
        raise UserError("run.embeddings.decoder_nodes: names nodes for decoders, and decoders is 0; raise it")


def _embed_dim(store: Store, clip: Mapping[str, str]) -> int:
    """The dimension of a CLIP's embeddings, from its configuration."""
    return json.loads(read_blob(store, clip["open_clip_config.json"]))["model_cfg"]["embed_dim"]


def read_embeddings(store: Store, blob: str) -> tuple[list[str], Any, Any, Any]:
    """Keys [n], image and first captions' embeddings float16 [n, d], similarities float32 [n] of one shard."""
    vectors = ("image_embedding", "text_embedding")
    table = read_table(store, blob, ["key", *vectors, "similarity"])
    flat = [table[name].combine_chunks().values.to_numpy(zero_copy_only=False) for name in vectors]
    matrices = [values.reshape(len(table), values.size // max(len(table), 1)) for values in flat]
    return table["key"].to_pylist(), matrices[0], matrices[1], table["similarity"].to_numpy()
