"""What models begin with instead of random weights: CLIP's text tower, and statistics of training rows."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load
from sklearn.linear_model import Ridge as SolvedRidge
from torch import Tensor, nn

from models.frozen_text import CaptionRegression, FrozenCaption, FrozenTower
from models.tokens import tokenize
from pipeline.errors import UserError
from pipeline.graph.stages import Context
from pipeline.store.records import read_blob
from pipeline.training.feed.tables import Tables
from pipeline.training.task import Batch

ROWS = 65_536  # at most, of rows and of their captions, which are measured
PENALTIES, COST, BLOCKS = np.logspace(-3, 3, 7), 0.01, 10


class Ridge(NamedTuple):
    """Holds a regression of image embeddings [n, d] on inputs [n, k], fp64: image_mean + weight (input - mean)."""

    weight: Tensor
    mean: Tensor
    image_mean: Tensor


def frozen_tower(ctx: Context) -> FrozenTower | None:
    """Returns the text tower of the run's CLIP where the stage's model reads it frozen, else None.

    Raises UserError for a CLIP whose text tower is of another kind, and CorruptObject.
    """
    if ctx.recipe.model.text_encoder != "frozen":
        return None
    blobs = ctx.inputs["clip"].blobs
    model_config = json.loads(read_blob(ctx.store, blobs["open_clip_config.json"]))["model_cfg"]
    try:
        return FrozenTower.of(model_config, load(read_blob(ctx.store, blobs["open_clip_model.safetensors"])))
    except ValueError as e:
        raise UserError(f"{ctx.stage}.model: {e}") from e


def starting_rows(ctx: Context, columns: Sequence[str], captions: str = "first") -> Batch:
    """Returns columns of whole shards of training rows, drawn at random, until there are ROWS.

    Args:
        ctx: Stage that begins.
        columns: Columns among "tokens", "image_embedding" and "text_embedding".
        captions: "first", or "any" for one line a caption that was embedded.
    """
    tables = Tables(ctx.store, ctx.inputs, columns, "train", 0)
    order = random.Random(0).sample(range(len(tables.counts)), len(tables.counts))
    places = islice(((shard, row) for shard in order for row in range(tables.counts[shard])), ROWS)
    rows = tables.read(sorted(places))
    lines = list(islice(((row, i) for row in rows for i in range(row.versions if captions == "any" else 1)), ROWS))
    found: Batch = {}
    for name in columns:
        if name == "tokens":
            found[name] = tokenize([(row.captions or [""])[i] for row, i in lines])
        elif name == "text_embedding":
            found[name] = torch.from_numpy(np.stack([row.text_embeddings[i] for row, i in lines]))  # type: ignore[index]
        else:
            found[name] = torch.from_numpy(np.stack([getattr(row, name) for row, _ in lines]))
    return found


def begin_line(line: CaptionRegression | None, caption: nn.Module, rows: Batch | None) -> None:
    """Solves the regression that a prior begins with, if it has one and there are rows to solve it on.

    It reads captions by CLIP's text tower, whose weights ``caption`` has to have.
    """
    if line is not None and rows is not None:
        assert isinstance(caption, FrozenCaption)
        said = line.inputs(caption.text, rows["tokens"], rows["text_embedding"])
        line.start_from(*ridge(said.detach(), rows["image_embedding"]))


def ridge(inputs: Tensor, images: Tensor) -> Ridge:
    """Returns the ridge regression with the largest penalty that costs no more than COST of the least error.

    The error is that of every fifth of BLOCKS blocks of lines, solved on the others; lines of one row lie beside each
    other. A larger penalty costs little there, and other sentences than those of the captions are read far better.
    Fewer lines than BLOCKS take the largest penalty.
    """
    x, y = inputs.double().numpy(), images.double().numpy()
    penalty = PENALTIES[-1]
    if len(x) >= BLOCKS:
        held = np.arange(len(x)) * BLOCKS // len(x) % 5 == 4
        lines = [SolvedRidge(alpha=penalty).fit(x[~held], y[~held]) for penalty in PENALTIES]
        errors = np.array([np.square(line.predict(x[held]) - y[held]).sum() for line in lines])
        penalty = PENALTIES[errors <= (1 + COST) * errors.min()][-1]
    weight = SolvedRidge(alpha=penalty).fit(x, y).coef_
    return Ridge(*(torch.from_numpy(part) for part in (weight, x.mean(0), y.mean(0))))
