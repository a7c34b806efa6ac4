"""The text tower of the run's CLIP for models that read it, out of the artefact "clip"."""

from __future__ import annotations

import json

from safetensors.torch import load

from models.frozen_text import FrozenTower
from pipeline.errors import UserError
from pipeline.graph.stages import Context
from pipeline.store.records import read_blob


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
