"""The workers of the embeddings stage: CLIP on one thread, and the decoding of images beside it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from models.clip import Clip
from models.tokens import text_ends
from pipeline.data.embeddings.scores import Head, score_column
from pipeline.data.embeddings.stage import EMBEDDED_CAPTIONS, DecodeBatch, IndexRow
from pipeline.data.source.imported import SCHEME, read_imported
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import read_table, write_table
from pipeline.graph.shards import Helpers, ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.progress import Steps, add
from pipeline.settings import EmbeddingsSettings
from pipeline.store import Store
from pipeline.store.parallel import in_order
from pipeline.store.records import materialise

DecodedBatch = tuple[np.ndarray, Mapping[str, float]]
"""What DecodeBatch returns."""
Submit = Callable[[str | None, Sequence[IndexRow]], "Future[DecodedBatch]"]
"""Has a batch decoded elsewhere; takes the arguments of DecodeBatch."""


@dataclass(frozen=True)
class MakeEncoder:
    """Opens CLIP once in each worker process."""

    store: Store
    clip: Mapping[str, str]
    settings: EmbeddingsSettings
    heads: Mapping[str, Head]

    def __call__(self) -> Encoder:
        torch.set_num_threads(1)
        # Ray shows a worker the GPUs that are its own.
        on_gpu = torch.cuda.is_available() if self.settings.gpus == "auto" else self.settings.gpus > 0
        if on_gpu:  # a GPU would convolve in TF32, and that is more than rounding
            torch.backends.cudnn.allow_tf32 = False
        with tempfile.TemporaryDirectory() as folder:
            materialise(self.store, self.clip, folder)
            clip = Clip.from_folder(folder).eval()
        decode, helpers = DecodeBatch(self.store, clip.image_size), self.settings.decoders
        if helpers:
            submit: Submit = Helpers(decode, helpers, self.settings.decoder_nodes).submit
        else:
            submit = partial(ThreadPoolExecutor(1).submit, decode)  # type: ignore[call-arg]
        return Encoder(
            self.store, clip.to("cuda" if on_gpu else "cpu"), self.settings.batch, self.heads, submit, max(helpers, 1)
        )


class Encoder:
    """Embeds and scores the kept rows of one shard.

    Columns of the result: "key", "image_embedding" and "text_embedding" (float16 [d], unit norm, of the first caption),
    "more_text_embeddings" (a list of them, of the other captions), "similarity" (cosine of the first two), "width" and
    "height" of the stored image in pixels (null where embeddings are imported), "caption_length" (of the first, in
    characters), and "score_NAME" of every head.

    Args:
        store: where shards lie.
        clip: on the device that encodes.
        batch: rows of a batch; the last one is padded.
        heads: linear heads by the name of their score.
        submit: has a batch of images decoded.
        ahead: batches that are decoded in advance.
    """

    def __init__(
        self, store: Store, clip: Clip, batch: int, heads: Mapping[str, Head], submit: Submit, ahead: int
    ) -> None:
        self.store, self.clip, self.batch, self.heads = store, clip, batch, heads
        self.submit, self.ahead = submit, ahead

    def __call__(self, task: ShardTask) -> ShardOutput:
        steps = Steps()
        pairs, captions = task.inputs["pairs"], task.inputs["captions"]
        with steps("read"):
            rows = [r for r in read_table(self.store, pairs.blobs["index"]).to_pylist() if r["status"] == "kept"]
            texts = dict(zip(*read_table(self.store, captions.blobs["captions"]).to_pydict().values(), strict=True))
        came = np.array([r["url"].startswith(SCHEME) for r in rows], bool)  # embedded, with one caption
        captioned = [
            texts[r["key"]][: 1 if given else EMBEDDED_CAPTIONS] or [""] for r, given in zip(rows, came, strict=True)
        ]
        image, text = np.zeros((2, len(rows), self.clip.embed_dim), np.float32)
        pictured = [rows[i] for i in np.flatnonzero(~came)]
        blocks = [pictured[i : i + self.batch] for i in range(0, len(pictured), self.batch)]
        views = in_order(partial(self.submit, pairs.blobs.get("images")), blocks, self.ahead)
        image[came], text[came] = self._imported([rows[i] for i in np.flatnonzero(came)])
        with steps("encode"):
            text[~came] = self._texts([captioned[i][0] for i in np.flatnonzero(~came)])
            # In batches of their own, so that they cannot change a byte of the first ones.
            more = self._texts([caption for captions in captioned for caption in captions[1:]])
        image[~came] = self._images(views, len(pictured), steps)
        offsets = np.cumsum([0, *(len(captions) - 1 for captions in captioned)], dtype=np.int32)
        columns = {
            "key": pa.array([r["key"] for r in rows], pa.string()),
            "image_embedding": _column(image),
            "text_embedding": _column(text),
            "more_text_embeddings": pa.ListArray.from_arrays(pa.array(offsets), _column(more)),
        }
        columns["similarity"] = pa.array((image * text).sum(1).astype(np.float32))
        columns |= {name: pa.array([r[name] for r in rows], pa.int32()) for name in ("width", "height")}
        columns["caption_length"] = pa.array([len(captions[0]) for captions in captioned], pa.int32())
        columns |= {score_column(name): pa.array(head(image)) for name, head in self.heads.items()}
        with steps("pack"):
            data = write_table(columns, dictionary=False)
        return ShardOutput(Ledger(kept=len(rows)), {"embeddings": data}, seconds=steps.seconds)

    def _imported(self, rows: Sequence[IndexRow]) -> tuple[np.ndarray, np.ndarray]:
        """Reads imported image and text embeddings: fp32 [n, d] of unit norm.

        Raises:
            CorruptObject: when they have changed.
            UserError: when they are not of this CLIP's dimension.
        """
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

    def _images(self, views: Iterator[DecodedBatch], count: int, steps: Steps) -> np.ndarray:
        """Embeds ``count`` images, whose views come in batches that are full but for the last one."""
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

    def _texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds captions, each in a batch of the shortest length that holds it, whatever the other captions are."""
        result = np.zeros((len(texts), self.clip.embed_dim), np.float32)
        if not texts:
            return result
        tokenized, (empty,) = self.clip.tokenize(texts), self.clip.tokenize([""]).numpy()
        lengths = self.clip.text_lengths
        fitting = np.searchsorted(lengths[:-1], text_ends(tokenized).numpy())  # the last one holds all
        tokens = tokenized.numpy()
        for number, length in enumerate(lengths):
            rows = np.flatnonzero(fitting == number)
            length = length if number < len(lengths) - 1 else tokens.shape[1]
            for start in range(0, len(rows), self.batch):
                block = rows[start : start + self.batch]
                padded = np.tile(empty[:length], (self.batch, 1))
                padded[: len(block)] = tokens[block, :length]
                result[block] = self._encode(self.clip.encode_text, padded)[: len(block)]
        return result

    def _encode(self, encode: Callable[[torch.Tensor], torch.Tensor], batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return encode(torch.from_numpy(batch).to(self.clip.mean.device)).float().cpu().numpy()


def _column(embeddings: np.ndarray) -> pa.Array:
    """Returns embeddings [n, d] as a column of float16 lists of one length."""
    return pa.FixedSizeListArray.from_arrays(pa.array(embeddings.astype(np.float16).reshape(-1)), embeddings.shape[1])
