"""What models begin with instead of random weights: statistics of the embeddings of training rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn

from models.frozen_text import CaptionLine, FrozenCaption, FrozenTower
from models.tokens import tokenize
from pipeline.graph.stages import Context
from pipeline.training.feed.tables import Tables
from pipeline.training.task import Batch

ROWS = 65_536  # at most, which are measured
PENALTIES = np.logspace(-3, 3, 13)


class Ridge(NamedTuple):
    """Holds a regression of image embeddings [n, d] on inputs [n, k], fp64: image_mean + weight (input - mean)."""

    weight: Tensor
    mean: Tensor
    image_mean: Tensor


def starting_rows(ctx: Context, columns: Sequence[str]) -> Batch:
    """Returns columns of whole shards of training rows, drawn at random, until there are ROWS.

    ``columns`` are of "tokens", "image_embedding" and "text_embedding"; of a row's captions the first counts.
    """
    tables = Tables(ctx.store, ctx.inputs, columns, "train", 0)
    order = random.Random(0).sample(range(len(tables.counts)), len(tables.counts))
    places = islice(((shard, row) for shard in order for row in range(tables.counts[shard])), ROWS)
    rows = tables.read(sorted(places))
    found: Batch = {}
    for name in columns:
        if name == "tokens":
            found[name] = tokenize([(row.captions or [""])[0] for row in rows])
        else:
            found[name] = torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
    return found


def begin_line(line: CaptionLine | None, caption: nn.Module, tower: FrozenTower | None, rows: Batch | None) -> None:
    """Solves the regression that a prior begins with, if it has one and there are rows to solve it on."""
    if line is not None and tower is not None and rows is not None:
        assert isinstance(caption, FrozenCaption)
        tower.put_into(caption)
        said = line.inputs(caption.text, rows["tokens"], rows["text_embedding"])
        line.start_from(*ridge(said.detach(), rows["image_embedding"]))


def ridge(inputs: Tensor, images: Tensor) -> Ridge:
    """Returns the ridge regression with the penalty that leaves the least error on rows left out."""
    x, y = inputs.double().numpy(), images.double().numpy()
    found = RidgeCV(alphas=PENALTIES).fit(x, y)
    return Ridge(*(torch.from_numpy(np.asarray(part)) for part in (found.coef_, x.mean(0), y.mean(0))))
