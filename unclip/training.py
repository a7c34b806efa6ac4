"""Trains one model on data of a program's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from models.clip import Clip
from models.codec import Codec
from models.frozen_text import FrozenTower
from models.tokens import CONTEXT
from pipeline.config import TRAININGS, make_config
from pipeline.errors import UserError
from pipeline.graph.device import choose_device
from pipeline.held_out import FEWEST
from pipeline.parse import ELSEWHERE
from pipeline.training.in_process import Examples, TrainedModel, train_on
from pipeline.training.task import Batch, Task, task_type
from pipeline.training.tasks.ar_prior import ARPriorTask
from pipeline.training.tasks.clip import ClipTask
from pipeline.training.tasks.decoder import DecoderTask
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask
from pipeline.training.tasks.starts import ROWS
from pipeline.training.tasks.upsampler import UpsamplerTask
from unclip.embedded_rows import MADE_OF, embedded, makes
from unclip.rows import Rows, check_row, open_rows


def train(
    stage: str,
    data: Any,
    preset: str = "nano",
    device: str = "auto",
    clip: Clip | None = None,
    codec: Codec | None = None,
    task: Task | None = None,
    progress: bool = True,
    *,
    validation: Any = None,
    callback: Callable[[TrainedModel], object] | None = None,
    checkpoint: str | Path | None = None,
    **recipe: Any,
) -> TrainedModel:
    """Trains one model on your own data with the pipeline's training loop, in this process.

    Args:
        stage: Model to train, by the name of its section in a configuration, such as "decoder".
        data: Columns or a dataset.
            Columns are a mapping, with a row for each example: "image" uint8 [n, 3, s, s] of the model's side,
            "captions" (n strings) or "tokens" int64 [n, 77], "image_embedding" and "text_embedding" fp [n, d] of unit
            norm; those that the model reads.
            A dataset has len and index, such as torch's, Hugging Face's, ``Pairs`` or a list. Its rows are mappings
            of the same names (also "caption" or "text", a string or a list of which the first is read) or (image,
            caption). An image is PIL's of any size, an array uint8 [h, w, 3] or a tensor uint8 [3, h, w], of which
            the model sees the square centre. Rows are read by threads while the model trains; what a model measures
            before its first step (``ridge``, ``whiten``) is read of the first 65,536 rows. Embeddings that a row lacks
            are made of its image and caption with ``clip``, of all rows before the first step.
        preset: Preset whose values hold for the fields that ``recipe`` leaves out.
        device: "cpu", "cuda", or "auto", which is a GPU where there is one.
        clip: CLIP that makes the embeddings that ``data`` lacks, and whose text tower a model with ``text_encoder:
            frozen`` reads.
        codec: Codec of the AR prior.
        task: Task of your own in place of the stage's.
        progress: Progress line on stderr.
        validation: Held-out data, as ``data``. The averaged weights are validated on them at the start, after 64
            steps, 256 and so on, and at the end; the journal has "validation_loss" and the model's other figures.
        callback: Function that is called with the averaged model and the journal after every line of the journal:
            each of the first 128 steps, then 64 times a doubling. Training ends if it returns True.
        checkpoint: File for the state, saved once a minute and at the end. Where it exists, training goes on from it:
            the same call makes the same model, however often it was ended.
        recipe: Fields of the stage's recipe, such as ``samples=20_000`` or ``model={"width": 128}``.

    Raises:
        UserError: For an unknown stage, a recipe out of range, missing data or data with the wrong shape, and a
            checkpoint of another recipe.

    Examples:
        >>> prior, journal = unclip.train("diffusion_prior", pairs.tensors(), clip=clip, samples=64, progress=False)
    """
    if stage not in TRAININGS:
        raise UserError(f"unknown model {stage}; use one of {', '.join(TRAININGS)}")
    if strange := [name for name in recipe if name in ELSEWHERE]:
        raise UserError("; ".join(f"{name} is called {ELSEWHERE[name]}" for name in strange))
    values = {"project": stage, "store": stage, "source": {"paths": [stage]}, "preset": preset, stage: recipe}
    config = make_config(values)
    chosen = getattr(config, stage)
    if stage == "clip" and chosen.pretrained:
        raise UserError(f"weights: {chosen.weights} is trained already; leave weights out")
    if chosen.init_from is not None and not chosen.init_from.path:
        raise UserError("init_from: a sha256 names a blob of a store, but this training has no store; name a file")
    columns, on = (task or task_type(chosen)).columns, choose_device(device)
    rows = _open(stage, data, columns, clip)
    held_rows = None if validation is None else _open(stage, validation, columns, clip)
    if held_rows is not None and len(held_rows) < FEWEST:
        raise UserError(f"validation has {len(held_rows)} rows, but needs {FEWEST}")
    if task is None:
        _check_parts(stage, chosen.model, clip, codec)
    if clip is not None:
        batch, bf16 = config.run.embeddings.batch, config.embeddings.precision == "bf16"
        rows = embedded(rows, columns, clip, on, batch, bf16, progress)
        held_rows = held_rows and embedded(held_rows, columns, clip, on, batch, bf16, progress)
    task = task or _task(stage, chosen.model, rows, clip, codec)
    examples = _examples(stage, task, rows)
    held_out = None if held_rows is None else _examples(stage, task, held_rows)
    place = None if checkpoint is None else Path(checkpoint)
    return train_on(stage, task, examples, chosen, on, held_out, callback, place, progress)


def _check_parts(stage: str, model: Any, clip: Clip | None, codec: Codec | None) -> None:
    """Raises UserError for a model that reads a CLIP or a codec, where there is none."""
    if stage == "ar_prior" and codec is None:
        raise UserError("ar_prior predicts a codec's codes: pass codec=, such as project.artifact('codec').model()")
    if getattr(model, "text_encoder", "") == "frozen" and clip is None:
        raise UserError(f"{stage} of this preset reads CLIP's text tower: pass clip=, such as model.cascade.clip")


def _open(stage: str, data: Any, columns: Sequence[str], clip: Clip | None) -> Rows:
    """Returns the rows of data. Raises UserError where columns are missing that ``clip`` cannot make."""
    rows = open_rows(data)
    missing = [name for name in columns if not rows.has(name) and name not in makes(clip, rows)]
    if not missing:
        if not len(rows):
            raise UserError("data has no rows")
        return rows
    said = f"{stage} reads {', '.join(columns)}; data has no {', '.join(missing)}"
    if any(name in MADE_OF for name in missing):
        of = "an image and a caption in each row"
        said += f": give {of}, of which clip= makes embeddings" if clip else f": pass clip=, which makes them of {of}"
        said += ", or add what model.embed makes of images and of captions"
    raise UserError(said)


def _task(stage: str, model: Any, rows: Rows, clip: Clip | None, codec: Codec | None) -> Task:
    if stage == "clip":
        return ClipTask(model)
    if stage.startswith("upsampler"):
        return UpsamplerTask(model)
    tower = None
    if model.text_encoder == "frozen":
        assert clip is not None
        tower = FrozenTower.of(clip.model_config, clip.model.state_dict())
    dim = rows.take([0], ("image_embedding",))["image_embedding"].shape[-1]
    if stage == "ar_prior":
        assert codec is not None
        return ARPriorTask(model, dim, codec, tower, _head(rows, ARPriorTask.columns) if model.ridge else None)
    if stage == "decoder":
        embeddings = _head(rows, ("image_embedding",)) if model.whiten else None
        return DecoderTask(model, dim, tower, embeddings["image_embedding"] if embeddings else None)
    return DiffusionPriorTask(model, dim, tower, _head(rows, DiffusionPriorTask.columns) if model.ridge else None)


def _head(rows: Rows, names: Sequence[str]) -> Batch:
    """Returns the first rows, of which a model measures what it begins with."""
    return rows.take(range(min(len(rows), ROWS)), names)


def _examples(stage: str, task: Task, rows: Rows) -> Examples:
    """Returns rows with the task's columns.

    Raises UserError for columns that are, by the first row, of another shape.
    """
    names, side = task.columns, task.image_size
    shapes = {"image": (3, side, side), "tokens": (CONTEXT,)}
    first = {name: column[0] for name, column in rows.take([0], names, side).items()}
    for name, value in first.items():
        check_row(stage, name, value, shapes.get(name, tuple(value.shape) if value.ndim == 1 else ("d",)))
    dims = {name: len(value) for name, value in first.items() if name.endswith("_embedding")}
    if len(set(dims.values())) > 1:
        raise UserError(f"embeddings differ in dimension, so they are not of one CLIP: {dims}")
    return Examples(len(rows), partial(rows.take, names=names, side=side))
