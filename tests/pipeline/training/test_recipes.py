"""Recipes refuse what cannot work, and every preset makes recipes."""

from typing import Any

import pytest

from pipeline.config import PRESETS, TRAININGS, preset_config
from pipeline.training.recipes import ARPriorRecipe, ClipRecipe, DecoderRecipe, DiffusionPriorRecipe, UpsamplerRecipe


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stage", TRAININGS)
def test_every_preset_trains_for_a_batch_and_beyond_its_warmup(preset: str, stage: str) -> None:
    recipe = getattr(preset_config(preset), stage)
    assert recipe.samples >= recipe.batch
    assert recipe.warmup_steps * recipe.batch < recipe.samples


def test_defaults_are_table_3() -> None:
    ar, diffusion, decoder, upsampler = ARPriorRecipe(), DiffusionPriorRecipe(), DecoderRecipe(), UpsamplerRecipe()
    last = preset_config("paper").upsampler_1024
    columns = (ar, diffusion, decoder, upsampler, last)
    assert [r.batch for r in columns] == [4096, 4096, 2048, 1024, 512]
    assert [r.samples // r.batch for r in columns] == [1_000_000, 600_000, 800_000, 1_000_000, 1_000_000]
    assert [r.learning_rate for r in columns] == [1.6e-4, 1.1e-4, 1.2e-4, 1.2e-4, 1e-4]
    assert [r.beta2 for r in (ar, diffusion, decoder)] == [0.91, 0.96, 0.999]
    assert [r.weight_decay for r in (ar, diffusion, decoder)] == [4e-2, 6e-2, 0]
    for recipe, decay in ((ar, 0.999), (diffusion, 0.9999), (decoder, 0.9999), (last, 0.9999)):
        assert 0.5 ** (recipe.batch / recipe.ema_half_life) == pytest.approx(decay, abs=1e-8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 100}, "batch 100 is not a multiple of lanes 64"),
        ({"samples": 64, "batch": 128}, "samples 64 is less than one batch of 128"),
        ({"decay": 10**10}, "decay is 10000000000"),
    ],
)
def test_impossible_recipes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderRecipe(**fields)


@pytest.mark.parametrize("weights", ["", "openai", "open_clip:ViT-L-14", "local-dir:", "train:me", "open_clip::openai"])
def test_unknown_sources_of_clip_are_refused(weights: str) -> None:
    with pytest.raises(ValueError, match="weights is"):
        ClipRecipe(weights=weights)


def test_a_training_stops_at_whole_batches() -> None:
    recipe = ClipRecipe(samples=102, batch=32, decay=40, lanes=8)
    assert (recipe.whole_samples, recipe.fork) == (128, 64)
