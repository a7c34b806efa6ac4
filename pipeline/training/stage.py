"""The stages that train models. Light: what trains is imported when a stage runs."""

from __future__ import annotations

from typing import Any

from models.prior_configs import VOCABULARY
from models.sampling_config import BASE, UPSAMPLERS
from pipeline.data.source.lists import lists_there
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Context, Stage
from pipeline.settings import TrainingSettings
from pipeline.training.recipes import (
    ARPriorRecipe,
    ClipRecipe,
    DecoderRecipe,
    DiffusionPriorRecipe,
    TrainingRecipe,
    UpsamplerRecipe,
)

LEARN = ("pairs", "captions", "embeddings", "curation")  # what a model learns from that reads captions


def check_first(ctx: Context) -> None:
    """Raises UserError for settings and inputs with which the training would fail."""
    if ctx.recipe.pretrained:
        return
    from pipeline.training.checks import check
    from pipeline.training.task import task_of

    check(ctx, task_of(ctx))


def train(ctx: Context) -> Artifact:
    """Trains until the recipe's stop, or takes the CLIP that the recipe names."""
    if ctx.recipe.pretrained:
        from pipeline.training.tasks.clip import take_clip

        return take_clip(ctx)
    from pipeline.training.train import train_model

    return train_model(ctx)


def training(name: str, recipe: type[TrainingRecipe], inputs: tuple[str, ...], **more: Any) -> Stage:
    """Declares a stage that trains a model; ``more`` are further fields of Stage."""
    how: dict[str, Any] = {"kind": "training", "settings": TrainingSettings, "check": check_first}
    return Stage(name, recipe.version, recipe, inputs, train, **how, **more)


def reads_text(stage: Stage, config: Any) -> tuple[str, ...]:
    """Returns the inputs of a model that reads captions: CLIP, too, where it reads CLIP's text tower."""
    return (*LEARN, "clip") if stage.recipe.model.text_encoder == "frozen" else LEARN


def _fits_tokens(stage: Stage, config: Any) -> None:
    if (words := stage.recipe.model.vocabulary) != VOCABULARY:
        raise UserError(f"{stage.name}.model.vocabulary: {words}; CLIP's tokens are {VOCABULARY}, so leave it out")


def _clip_fits(stage: Stage, config: Any) -> None:
    for found in () if stage.recipe.pretrained else lists_there(config.source.paths):
        if found.embedded:
            raise UserError(
                f"source {found.path}: a CLIP cannot train on imported embeddings; name the CLIP that made them in "
                "clip.weights"
            )


def _decoder_fits(stage: Stage, config: Any) -> None:
    _fits_tokens(stage, config)
    if (side := stage.recipe.model.image_size) != BASE:
        raise UserError(f"decoder.model.image_size: {side}; the cascade begins at {BASE}")


def _upsampler_fits(stage: Stage, config: Any) -> None:
    name, model, side = stage.name, stage.recipe.model, UPSAMPLERS[stage.name]
    if (model.low_size, model.image_size) != (side // 4, side):
        made = f"{model.low_size} -> {model.image_size}"
        raise UserError(f"{name}.model: makes {made}; the cascade needs {side // 4} -> {side}")
    if name in config.bundle.models and config.pairs.image_size < side:
        raise UserError(
            f"pairs.image_size: {config.pairs.image_size} is too small for {name}, which trains on {side} px; "
            f"raise it or leave {name} out of bundle.models"
        )


CLIP = training(
    "clip",
    ClipRecipe,
    ("pairs", "captions", "filter"),
    needs=lambda stage, config: ("pairs", "captions") if stage.recipe.pretrained else stage.inputs,
    pinned=True,
    clips=("weights",),
    fits=_clip_fits,
)
AR_PRIOR = training(
    "ar_prior",
    ARPriorRecipe,
    (*LEARN, "codec"),
    needs=lambda stage, config: (*reads_text(stage, config), "codec"),
    fits=_fits_tokens,
)
DIFFUSION_PRIOR = training("diffusion_prior", DiffusionPriorRecipe, LEARN, needs=reads_text, fits=_fits_tokens)
DECODER = training("decoder", DecoderRecipe, LEARN, needs=reads_text, fits=_decoder_fits)
UPSAMPLER_256, UPSAMPLER_1024 = (
    training(name, UpsamplerRecipe, ("pairs", "curation"), fits=_upsampler_fits) for name in UPSAMPLERS
)
