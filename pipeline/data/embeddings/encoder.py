"""The encoder of the embeddings stage: CLIP in batches of one size, on one thread or a GPU."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import normalize

from models.clip import Clip
from models.tokens import cut_captions, text_ends
from pipeline.data.embeddings.parts import ImageParts, captions_to_encode, read_embeddings
from pipeline.errors import UserError
from pipeline.graph.artifacts import Shard, ShardRow, read_shards
from pipeline.graph.shards import run_shards
from pipeline.graph.stages import Context, shard_key
from pipeline.graph.workers import ShardOutput, ShardTask, ShardWorker, Timed
from pipeline.ledger import Ledger
from pipeline.progress import Steps
from pipeline.store import Store
from pipeline.store.records import materialise, read_blob

CHECKED = 1000  # rows that bf16 is compared with fp32 on


@dataclass(frozen=True)
class OpenEncoder:
    """Opens CLIP, once in each worker process; ``gpus`` as in the settings, ``bf16`` only where a GPU computes so."""

    store: Store
    clip: Mapping[str, str]
    batch: int
    gpus: float | Literal["auto"]
    bf16: bool

    def __call__(self) -> Encoder:
        torch.set_num_threads(1)
        # Ray shows a worker the GPUs that are its own.
        on_gpu = torch.cuda.is_available() if self.gpus == "auto" else self.gpus > 0
        if on_gpu:  # a GPU would convolve in TF32, and that is more than rounding
            torch.backends.cudnn.allow_tf32 = False
        with tempfile.TemporaryDirectory() as folder:
            materialise(self.store, self.clip, folder)
            try:
                clip = Clip.from_folder(folder).eval()
            except ValueError as e:
                raise UserError(f"embeddings: the CLIP cannot be opened on {socket.gethostname()}: {e}") from e
        bf16 = self.bf16 and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        return Encoder(self.store, clip.to("cuda" if on_gpu else "cpu"), self.batch, bf16)


class Encoder:
    """Embeds the images of one part of a shard, and with the first part all captions of the shard.

    Args:
        store: store of the shards.
        clip: CLIP on the device that encodes.
        batch: rows of a batch; the last one is padded.
        bf16: autocast to bf16; embeddings are then made unit vectors in fp32.
    """

    def __init__(self, store: Store, clip: Clip, batch: int, bf16: bool = False) -> None:
        self.store, self.clip, self.batch, self.bf16 = store, clip, batch, bf16

    def __call__(self, task: ShardTask, part: int, views: np.ndarray) -> Timed:
        """Returns "image" fp32 [n, d], with the first part also "text", of first captions, and "more", of others.

        "bf16" says whether it computed in bf16, "cut" how many of these captions have more tokens than CLIP reads.
        """
        steps = Steps()
        made: dict[str, Any] = {"bf16": self.bf16}
        if not part:
            with steps("read"):
                first, more = captions_to_encode(self.store, task)
            with steps("encode"):
                # In batches of their own, so that other captions cannot change a byte of the first ones.
                for name, captions in (("text", first), ("more", more)):
                    tokens = self.clip.tokenize(captions)
                    made[name] = self.texts(tokens)
                    made["cut"] = made.get("cut", 0) + self._cut(captions, tokens)
        with steps("encode"):
            made["image"] = self.images(views)
        return made, steps.seconds

    def images(self, views: np.ndarray) -> np.ndarray:
        """Embeds views uint8 [n, size, size, 3]: fp32 [n, d]."""
        size = self.clip.image_size
        result = np.zeros((len(views), self.clip.embed_dim), np.float32)
        for start in range(0, len(views), self.batch):
            block = views[start : start + self.batch]
            pixels = np.zeros((self.batch, 3, size, size), np.uint8)
            pixels[: len(block)] = block.transpose(0, 3, 1, 2)
            result[start : start + len(block)] = self._encode(self.clip.encode_image, pixels)[: len(block)]
        return result

    def texts(self, tokenized: torch.Tensor) -> np.ndarray:
        """Embeds tokens int64 [n, context] of captions: fp32 [n, d].

        Each is in a batch of the shortest length that holds it, whatever the other captions are.
        """
        result = np.zeros((len(tokenized), self.clip.embed_dim), np.float32)
        if not len(tokenized):
            return result
        (empty,) = self.clip.tokenize([""]).numpy()
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

    def _cut(self, captions: Sequence[str], tokenized: torch.Tensor) -> int:
        """Counts captions with more tokens than CLIP reads; of a tokenizer other than CLIP's BPE none are counted."""
        if self.clip.own_tokenizer is not None:
            return 0
        context = self.clip.context_length
        full = (text_ends(tokenized) >= context).tolist()  # only these need a second look
        return cut_captions([caption for caption, ends in zip(captions, full, strict=True) if ends], context)

    def _encode(self, encode: Callable[[torch.Tensor], torch.Tensor], batch: np.ndarray) -> np.ndarray:
        device = self.clip.mean.device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            found = encode(torch.from_numpy(batch).to(device)).float()
        return (normalize(found, dim=1) if self.bf16 else found).cpu().numpy()


def embedding_metrics(ctx: Context, opened: OpenEncoder, parts: ImageParts, made: Sequence[Shard]) -> dict[str, float]:
    """Returns "captions_cut" and, where some shards were made in bf16, "cosine_error"."""
    cut = sum(shard.counts.get("cut", 0) for shard in made)
    return {"captions_cut": cut} | cosine_error(ctx, opened, parts, made)


def cosine_error(ctx: Context, opened: OpenEncoder, parts: ImageParts, made: Sequence[Shard]) -> dict[str, float]:
    """Returns "cosine_error" if some shards were made in bf16.

    It is the largest difference from 1 of the cosine of an image's published embedding and that in fp32. A worker
    compares the images of the first shards, CHECKED rows or a little more.
    """
    if not any(shard.counts.get("bf16") for shard in made):
        return {}
    pairs = {shard.number: shard for shard in read_shards(ctx.store, ctx.inputs["pairs"])}
    inputs: dict[str, ShardRow] = {}
    rows = 0
    for shard in (shard for shard in made if shard.counts.get("bf16")):
        if rows >= CHECKED:
            break
        rows += shard.counts["bf16"]
        embeddings = ShardRow(shard.number, shard.key, shard.ledger.kept, 0, shard.blobs, {})
        inputs |= {f"pairs {shard.number:08d}": pairs[shard.number], f"embeddings {shard.number:08d}": embeddings}
    task = ShardTask(0, shard_key(ctx, {"pass": "fp32"} | {name: shard.key for name, shard in inputs.items()}), inputs)
    check = partial(_open_check, replace(opened, bf16=False), parts)
    [[checked], _] = run_shards(ctx, [task], check, "rows", rows, f"{ctx.stage} against fp32")
    return {"cosine_error": json.loads(read_blob(ctx.store, checked.blobs["error"]))}


def _open_check(opened: OpenEncoder, parts: ImageParts) -> ShardWorker:
    return partial(_check, opened(), parts)


def _check(encoder: Encoder, parts: ImageParts, task: ShardTask) -> ShardOutput:
    """Makes the "error" of the shards "embeddings NUMBER", which were made of the shards "pairs NUMBER"."""
    errors = [0.0]
    for name, pairs in sorted(task.inputs.items()):
        if name.startswith("pairs"):
            keys, stored, *_ = read_embeddings(
                encoder.store, task.inputs[name.replace("pairs", "embeddings")].blobs["embeddings"]
            )
            place = {key: i for i, key in enumerate(keys)}
            own = ShardTask(pairs.number, "", {"pairs": pairs})
            for part in range(parts.count(own)):
                rows, views, _ = parts.read(own, part)
                ours = stored[[place[row["key"]] for row in rows]].astype(np.float64)
                exact = encoder.images(views).astype(np.float64)
                norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(exact, axis=1)
                errors += (1 - (ours * exact).sum(1) / norms).tolist()
                if len(errors) > CHECKED:
                    break
    return ShardOutput(Ledger(kept=len(errors) - 1), {"error": json.dumps(max(errors)).encode()})
