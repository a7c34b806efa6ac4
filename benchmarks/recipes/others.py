"""What the judge of trials is trained on, so that it differs from every model's CLIP: other crops, other captions."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from random import Random
from typing import Any

import torch
from torchvision.transforms.v2 import RandomResizedCrop

from models.draw import Draw, derive_seed
from models.losses import Losses
from models.prior_configs import ClipConfig
from models.tokens import tokenize
from pipeline.evaluate.captions import Phrases
from pipeline.graph.stages import Context
from pipeline.training.feed.feed import Feed, LocalBatch
from pipeline.training.feed.tables import Tables
from pipeline.training.task import Batch
from pipeline.training.tasks.clip import ClipTask


class Cropped(ClipTask):
    """Trains CLIP on random resized crops, from ``least`` of the area to all of it, sides from 3:4 to 4:3."""

    def __init__(self, config: ClipConfig, least: float):
        super().__init__(config)
        self.crop = RandomResizedCrop(config.image_size, scale=(least, 1.0), antialias=True)

    def loss(self, model: Any, batch: Batch, draw: Draw) -> Losses:
        """Returns the contrastive loss of each row; the loop seeds PyTorch's generator, which the crops use."""
        images = torch.stack([self.crop(image) for image in batch["image"]])
        return super().loss(model, batch | {"image": images}, draw)


class Reworded:
    """Feeds what another feed does, with captions made of a random choice of style, name and background."""

    def __init__(self, feed: Feed, ctx: Context):
        tables = Tables(ctx.store, ctx.inputs, ("tokens",), "train", 0)
        rows = tables.first(sum(tables.counts))
        self.feed, self.phrases = feed, ctx.config.evaluation.phrases
        self.captions = {row.key: (row.captions or [""])[0] for row in rows}

    def batches(self, samples: int) -> Generator[LocalBatch, None, None]:
        """Yields the feed's batches, their captions reworded by the seeds of their rows."""
        with closing(self.feed.batches(samples)) as batches:
            for local in batches:
                seed = local.streams[0][0]
                words = [
                    reworded(self.captions[key], self.phrases, derive_seed(seed, "words", i))
                    for i, key in enumerate(local.keys)
                ]
                yield local._replace(batch=local.batch | {"tokens": tokenize(words)})


def reworded(caption: str, phrases: Phrases, seed: int) -> str:
    """Returns a caption of the name and, each with probability 1/2, of style and background, in random order.

    A caption without such parts stays as it is.
    """
    parts = phrases.parts(caption)
    if parts is None:
        return caption
    random = Random(seed)
    others = [part for part in (parts.style.removesuffix(" of"), parts.background) if part and random.random() < 0.5]
    chosen = [parts.name, *others]
    random.shuffle(chosen)
    return ", ".join(chosen)
