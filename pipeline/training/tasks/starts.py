"""What models begin with instead of random weights: statistics of the embeddings of training rows."""

from __future__ import annotations

import random
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor

from pipeline.graph.stages import Context
from pipeline.training.feed.tables import Tables

ROWS = 65_536  # at most, which are measured
PENALTIES = np.logspace(-3, 2, 11)


class Embeddings(NamedTuple):
    """Holds embeddings of training rows, fp32 [n, d] each; of a row's captions that of the first."""

    image: Tensor
    text: Tensor


class Ridge(NamedTuple):
    """Holds a regression of image on text embeddings, fp64: image_mean + weight (text - text_mean)."""

    weight: Tensor
    text_mean: Tensor
    image_mean: Tensor

    @property
    def bias(self) -> Tensor:
        """Returns its image embedding for a text embedding of zero, [d]."""
        return self.image_mean - self.weight @ self.text_mean


def training_embeddings(ctx: Context) -> Embeddings:
    """Returns embeddings of whole shards of training rows, drawn at random, until there are ROWS."""
    tables = Tables(ctx.store, ctx.inputs, ("image_embedding", "text_embedding"), "train", 0)
    order = random.Random(0).sample(range(len(tables.counts)), len(tables.counts))
    places = islice(((shard, row) for shard in order for row in range(tables.counts[shard])), ROWS)
    rows = tables.read(sorted(places))
    image, text = [row.image_embedding for row in rows], [row.text_embedding for row in rows]
    return Embeddings(*(torch.from_numpy(np.stack(column)) for column in (image, text)))  # type: ignore[arg-type]


def ridge(embeddings: Embeddings) -> Ridge:
    """Returns the ridge regression with the penalty that leaves the least error on rows left out."""
    image, text = (column.double().numpy() for column in embeddings)
    found = RidgeCV(alphas=PENALTIES).fit(text, image)
    return Ridge(*(torch.from_numpy(np.asarray(part)) for part in (found.coef_, text.mean(0), image.mean(0))))
