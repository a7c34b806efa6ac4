"""The encoder of the embeddings stage: CLIP in batches of one size, on one thread or a GPU."""

from __future__ import annotations

import json
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import normalize

from models.clip import Clip
from models.tokens import END
from pipeline.data.embeddings.parts import ImageParts, open_clip_files, read_embeddings
from pipeline.graph.artifacts import Shard, ShardRow, read_shards
from pipeline.graph.shards import run_shards
from pipeline.graph.stages import Context, shard_key
from pipeline.graph.workers import ShardOutput, ShardTask, ShardWorker, Timed
from pipeline.ledger import Ledger
from pipeline.progress import Steps
from pipeline.store import Store
from pipeline.store.records import read_blob

AHEAD = 4  # batches that a GPU has to do or does
CHECKED = 1000  # rows that bf16 is compared with fp32 on
Fetch = Callable[[], np.ndarray]
"""Waits for embeddings, and returns them."""


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
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it lies in Ray's object store
        # A worker of Ray sees the GPUs that are its own.
        on_gpu = torch.cuda.is_available() if self.gpus == "auto" else self.gpus > 0
        if on_gpu:  # a GPU would convolve in TF32, and that is more than rounding
            torch.backends.cudnn.allow_tf32 = False
        clip = open_clip_files(self.store, self.clip, Clip.from_folder)
        bf16 = self.bf16 and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        return Encoder(clip.to("cuda" if on_gpu else "cpu"), self.batch, bf16)


class Encoder:
    """Embeds the views of one part of a shard, and with the first part all captions of the shard.

    On a GPU nothing waits for it until a part's embeddings are fetched: batches are copied from pinned memory beside
    the computation, and AHEAD of them are under way.

    Args:
        clip: CLIP on the device that encodes.
        batch: rows of a batch; the last one is padded.
        bf16: autocast to bf16; embeddings are then made unit vectors in fp32.
    """

    def __init__(self, clip: Clip, batch: int, bf16: bool = False) -> None:
        self.clip, self.batch, self.bf16 = clip, batch, bf16
        [self.empty] = clip.tokenize([""]).numpy()

    def __call__(self, task: ShardTask, part: int, prepared: Mapping[str, Any]) -> Timed:
        """Returns "image" fp32 [n, d], with the first part also "text", of first captions, and "more", of others.

        "bf16" says whether it computed in bf16, "cut" is as ImageParts.prepare has it.
        """
        steps = Steps()
        with steps("encode"):
            # In batches of their own, so that other captions cannot change a byte of the first ones.
            under_way = {name: self.texts(prepared[name]) for name in ("text", "more") if name in prepared}
            under_way["image"] = self.images(prepared["views"])
            made = {name: fetch() for name, fetch in under_way.items()}
        return {**made, "bf16": self.bf16, "cut": prepared.get("cut", 0)}, steps.seconds

    def images(self, views: np.ndarray) -> Fetch:
        """Begins to embed views uint8 [n, size, size, 3]; fetches fp32 [n, d].

        No pixel is moved on the host: permuted, views have the layout, channels last, that CLIP's convolutions read.
        """
        rows = np.arange(len(views))
        starts = range(0, len(views), self.batch)
        batches = ((rows[i : i + self.batch], self._filled(views[i : i + self.batch], np.uint8(0))) for i in starts)
        return self._encode(lambda pixels: self.clip.encode_image(pixels.permute(0, 3, 1, 2)), len(views), batches)

    def texts(self, tokens: np.ndarray) -> Fetch:
        """Begins to embed tokens int64 [n, context] of captions; fetches fp32 [n, d].

        Each is in a batch of the shortest length that holds it, whatever the other captions are.
        """

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            lengths = self.clip.text_lengths
            # The last one holds all.
            fitting = np.searchsorted(lengths[:-1], (tokens == END).argmax(1) + 1)
            for number, length in enumerate(lengths):
                length = length if number < len(lengths) - 1 else tokens.shape[1]
                of_length = np.flatnonzero(fitting == number)
                for start in range(0, len(of_length), self.batch):
                    rows = of_length[start : start + self.batch]
                    yield rows, self._filled(tokens[rows, :length], self.empty[:length])

        return self._encode(self.clip.encode_text, len(tokens), batches() if len(tokens) else ())

    def _filled(self, rows: np.ndarray, filler: np.ndarray | np.generic) -> np.ndarray:
        """Returns rows as a batch of full size."""
        lacking = self.batch - len(rows)
        return np.concatenate([rows, np.broadcast_to(filler, (lacking, *rows.shape[1:]))]) if lacking else rows

    def _encode(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        count: int,
        batches: Iterable[tuple[np.ndarray, np.ndarray]],
    ) -> Fetch:
        """Begins to embed batches, each with the places of its rows among ``count``; fetches fp32 [count, d]."""
        device = self.clip.mean.device
        places, found, ahead = list[np.ndarray](), list[torch.Tensor](), deque[torch.cuda.Event]()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            for rows, block in batches:
                batch = torch.from_numpy(block)
                if device.type == "cuda":  # from other memory a copy waits for all that the GPU has to do
                    batch = batch.pin_memory().to(device, non_blocking=True)
                made = encode(batch).float()
                places.append(rows)
                found.append((normalize(made, dim=1) if self.bf16 else made)[: len(rows)])
                if device.type == "cuda":
                    ahead.append(torch.cuda.Event(blocking=True))
                    ahead[-1].record()
                    if len(ahead) == AHEAD:  # pinned memory is bounded, and this process sleeps
                        ahead.popleft().synchronize()

        def fetch() -> np.ndarray:
            result = np.zeros((count, self.clip.embed_dim), np.float32)
            if found:
                result[np.concatenate(places)] = torch.cat(found).cpu().numpy()
            return result

        return fetch


def embedding_metrics(ctx: Context, opened: OpenEncoder, parts: ImageParts, made: Sequence[Shard]) -> dict[str, float]:
    """Returns "captions_cut" and, where some shards were made in bf16, "cosine_error"."""
    cut = sum(shard.counts.get("cut", 0) for shard in made)
    return {"captions_cut": cut} | cosine_error(ctx, opened, parts, made)


def cosine_error(ctx: Context, opened: OpenEncoder, parts: ImageParts, made: Sequence[Shard]) -> dict[str, float]:
    """Returns "cosine_error" if some shards were made in bf16.

    It is the largest difference from 1 of the cosine of an image's published embedding and that in fp32. Workers
    compare the images of the first shards, CHECKED rows or a little more.
    """
    pairs = {shard.number: shard for shard in read_shards(ctx.store, ctx.inputs["pairs"])}
    tasks: list[ShardTask] = []
    rows = 0
    for shard in made:
        if shard.counts.get("bf16") and rows < CHECKED:
            rows += shard.counts["bf16"]
            embeddings = ShardRow(shard.number, shard.key, shard.ledger.kept, 0, shard.blobs, {})
            inputs = {"pairs": pairs[shard.number], "embeddings": embeddings}
            key = shard_key(ctx, {"pass": "fp32"} | {name: each.key for name, each in inputs.items()})
            tasks.append(ShardTask(shard.number, key, inputs))
    if not tasks:
        return {}
    check = partial(_open_check, replace(opened, bf16=False), parts)
    checked, _ = run_shards(ctx, tasks, check, "rows", rows, f"{ctx.stage} against fp32")
    return {"cosine_error": max(json.loads(read_blob(ctx.store, shard.blobs["error"])) for shard in checked)}


def _open_check(opened: OpenEncoder, parts: ImageParts) -> ShardWorker:
    return partial(_check, opened(), parts)


def _check(encoder: Encoder, parts: ImageParts, task: ShardTask) -> ShardOutput:
    """Makes the "error" of a shard: the largest of its first rows."""
    keys, stored, *_ = read_embeddings(parts.store, task.inputs["embeddings"].blobs["embeddings"])
    place = {key: i for i, key in enumerate(keys)}
    errors = [0.0]
    for part in range(parts.count(task)):
        rows, views = parts.read(task, part, Steps())
        ours = stored[[place[row["key"]] for row in rows]].astype(np.float64)
        exact = encoder.images(views)().astype(np.float64)
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(exact, axis=1)
        errors += (1 - (ours * exact).sum(1) / norms).tolist()
        if len(errors) > CHECKED:
            break
    return ShardOutput(Ledger(kept=len(errors) - 1), {"error": json.dumps(max(errors)).encode()})
