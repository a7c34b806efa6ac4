"""Six short trainings, for processes that are killed in them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from models.image_configs import UpsamplerConfig
from models.prior_configs import ARPriorConfig
from pipeline.graph.stages import Context
from pipeline.settings import TrainingSettings
from pipeline.training.recipes import ARPriorRecipe, DecoderRecipe, UpsamplerRecipe
from tests.pipeline.training.conftest import World, make_world, with_codec
from tests.pipeline.training.trainings import CLIP_RECIPE, DECODER, RECIPE

STEPS, BATCH, KILLS = 200, 8, 5
HALF_LIFE = 10 * BATCH  # which the average has in the second half; in the first it is a tenth of the samples seen
SHARED: dict[str, Any] = {"samples": STEPS * BATCH, "batch": BATCH, "lanes": 8, "window": 5, "ema_half_life": HALF_LIFE}
DROPOUT = 0.1
UPSAMPLER = UpsamplerConfig(
    low_size=16, image_size=64, channels=8, depth=1, multipliers=(1, 2), steps=50, patch=2, dropout=DROPOUT
)
AR_PRIOR = ARPriorConfig(
    text_context=16, prefix=8, text_width=32, text_depth=1, text_heads=2, width=32, depth=1, heads=2, buckets=8,
    dropout=DROPOUT,
)  # fmt: skip
RECIPES = {
    "clip": replace(CLIP_RECIPE, precision="bf16", **SHARED),
    "ar_prior": ARPriorRecipe(model=AR_PRIOR, **SHARED),
    "diffusion_prior": replace(RECIPE, **SHARED),
    "decoder": DecoderRecipe(model=replace(DECODER, dropout=DROPOUT), **SHARED),
    "upsampler_256": UpsamplerRecipe(model=UPSAMPLER, **SHARED),
    "upsampler_1024": UpsamplerRecipe(model=replace(UPSAMPLER, corruption="bsr"), **SHARED),
}
INPUTS = {
    "clip": ("pairs", "captions", "filter"),
    "ar_prior": ("pairs", "captions", "embeddings", "curation", "codec"),
    "upsampler_256": ("pairs", "curation"),
    "upsampler_1024": ("pairs", "curation"),
}


def context(name: str, folder: Path) -> tuple[World, Context]:
    """One of the trainings, in a world of its own. Time decides when it saves: twice a second."""
    world = with_codec(make_world(folder))
    settings = TrainingSettings(threads=1, device="cpu", checkpoint_every_s=0.5)
    return world, world.context(name, RECIPES[name], settings, INPUTS.get(name, ()))
