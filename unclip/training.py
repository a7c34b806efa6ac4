"""Trains one model on tensors of a program's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.clip import Clip
from models.codec import Codec
from models.frozen_text import FrozenTower
from models.tokens import CONTEXT, tokenize
from pipeline.config import TRAININGS, make_config
from pipeline.errors import UserError
from pipeline.training.device import choose_device
from pipeline.training.task import Batch, Task
from pipeline.training.tasks.ar_prior import ARPriorTask
from pipeline.training.tasks.clip import ClipTask
from pipeline.training.tasks.decoder import DecoderTask
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask
from pipeline.training.tasks.starts import ROWS
from pipeline.training.tasks.upsampler import UpsamplerTask
from pipeline.training.tensors import train_on


class TrainedModel(NamedTuple):
    """A ``model`` with its averaged weights, in evaluation mode, and the ``journal``, a mapping for each line."""

    model: Any
    journal: list[dict[str, Any]]


def train(
    stage: str,
    data: Mapping[str, Any],
    preset: str = "nano",
    device: str = "auto",
    clip: Clip | None = None,
    codec: Codec | None = None,
    task: Task | None = None,
    progress: bool = True,
    **recipe: Any,
) -> TrainedModel:
    """Trains one model on data in memory, by the pipeline's own loop.

    Nothing is saved on the way: a training that takes days belongs into a project.

    Args:
        stage: Model to train, by the name of its section in a configuration, such as "decoder".
        data: Columns, with a row for each example: "image" uint8 [n, 3, s, s] of the model's side, "captions" (n
            strings) or "tokens" int64 [n, 77], "image_embedding" and "text_embedding" fp [n, d] of unit norm; those
            that the model reads.
        preset: Preset whose values hold for the fields that ``recipe`` leaves out.
        device: "cpu", "cuda", or "auto", which is a GPU where there is one.
        clip: CLIP whose text tower a model with ``text_encoder: frozen`` reads.
        codec: Codec of the AR prior.
        task: Task of your own in place of the stage's.
        progress: Progress line on stderr.
        recipe: Fields of the stage's recipe, such as ``samples=20_000`` or ``model={"width": 128}``.

    Raises:
        UserError: For an unknown stage, a recipe out of range, and data that are missing or of another shape.
    """
    if stage not in TRAININGS:
        raise UserError(f"unknown model {stage}; use one of {', '.join(TRAININGS)}")
    values = {"project": stage, "store": stage, "source": {"paths": [stage]}, "preset": preset, stage: recipe}
    chosen = getattr(make_config(values), stage)
    if stage == "clip" and chosen.pretrained:
        raise UserError(f"weights: {chosen.weights} exists already, and is not trained; leave weights out")
    if chosen.init_from is not None and not chosen.init_from.path:
        raise UserError("init_from: a sha256 names a file of a store, and this training has none; name a file")
    given = dict(data)
    if "captions" in given:
        captions = list(given["captions"])
        if isinstance(given.pop("captions"), str) or not all(isinstance(caption, str) for caption in captions):
            raise UserError("captions: give a list of strings, one an example")
        given["tokens"] = tokenize(captions)
    task = task or _task(stage, chosen.model, given, clip, codec)
    columns = _columns(stage, task, given)
    return TrainedModel(*train_on(stage, task, columns, chosen, choose_device(device), progress))


def _tensor(name: str, column: Any) -> Tensor:
    try:
        found = torch.as_tensor(column)
    except (ValueError, TypeError, RuntimeError) as e:
        raise UserError(f"{name}: not numbers, or not in rows of one length ({e})") from None
    if not found.ndim:
        raise UserError(f"{name} is one number; give a row an example")
    return found


def _task(stage: str, model: Any, data: Mapping[str, Any], clip: Clip | None, codec: Codec | None) -> Task:
    if stage == "clip":
        return ClipTask(model)
    if stage.startswith("upsampler"):
        return UpsamplerTask(model)
    tower = None
    if model.text_encoder == "frozen":
        if clip is None:
            raise UserError(f"{stage} of this preset reads CLIP's text tower: pass clip=, such as model.cascade.clip")
        tower = FrozenTower.of(clip.model_config, clip.model.state_dict())
    embeddings = _tensor("image_embedding", data.get("image_embedding", torch.zeros(0, 0)))
    dim = embeddings.shape[-1]
    if stage == "ar_prior":
        if codec is None:
            raise UserError("ar_prior predicts a codec's codes: pass codec=, such as project.artifact('codec').model()")
        return ARPriorTask(model, dim, codec, tower, _rows(data, ARPriorTask) if model.ridge else None)
    if stage == "decoder":
        return DecoderTask(model, dim, tower, embeddings[:ROWS].float())
    return DiffusionPriorTask(model, dim, tower, _rows(data, DiffusionPriorTask) if model.ridge else None)


def _rows(data: Mapping[str, Any], task: type[ARPriorTask | DiffusionPriorTask]) -> Batch | None:
    """Returns the rows of which a prior's regression is made, None where columns are missing: ``_columns`` says so."""
    if not set(task.columns) <= data.keys():
        return None
    return {name: _tensor(name, data[name])[:ROWS] for name in task.columns}


def _columns(stage: str, task: Task, data: Mapping[str, Any]) -> Batch:
    """Returns the task's columns. Raises UserError for those that are missing or of another shape."""
    if missing := set(task.columns) - data.keys():
        raise UserError(f"{stage} reads {', '.join(task.columns)}; data has no {', '.join(sorted(missing))}")
    side = task.image_size
    shapes = {"image": (3, side, side), "tokens": (CONTEXT,)}
    found: Batch = {}
    for name in task.columns:
        column = _tensor(name, data[name])
        column = column.float() if name.endswith("_embedding") else column
        shape = shapes.get(name, tuple(column.shape[1:2]) or ("d",))
        if tuple(column.shape[1:]) != tuple(shape) or not len(column):
            raise UserError(f"{name} has shape {list(column.shape)}; {stage} reads [n, {', '.join(map(str, shape))}]")
        if name == "image" and column.dtype != torch.uint8:
            raise UserError(f"image is {column.dtype}; give uint8 from 0 to 255")
        if name == "tokens" and column.is_floating_point():
            raise UserError(f"tokens are {column.dtype}; give whole numbers, such as models.tokens.tokenize makes")
        found[name] = column
    dims = {name: column.shape[1] for name, column in found.items() if name.endswith("_embedding")}
    if len(set(dims.values())) > 1:
        raise UserError(f"embeddings of one CLIP have one length: {dims}")
    if len({len(column) for column in found.values()}) > 1:
        sizes = ", ".join(f"{name} {len(column):,}" for name, column in found.items())
        raise UserError(f"columns have different numbers of rows: {sizes}")
    return found
