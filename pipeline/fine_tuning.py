"""Going on from a finished bundle: what a configuration says to fine-tune its models on other pairs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config import make_config
from pipeline.errors import UserError

# Not the AR prior: it speaks the codes of the codec that it was trained with, and other pairs have another codec.
MODELS = ("diffusion_prior", "decoder", "upsampler_256", "upsampler_1024")
LENGTH = 4  # a training from nothing is so many times as long
RATE = 10.0  # and its learning rate so many times as high
WARMUP = 100  # batches: the optimiser knows nothing of the weights that it is given
SHORTEST = 10  # batches; and the warmup is at most such a part of the training
EARLY = 4  # and the checkpoint that the evaluation compares with comes after such a part


def fine_tuning(bundle: Path, preset: str) -> dict[str, dict[str, Any]]:
    """Values of a configuration with this preset, by stage: the bundle's CLIP, and its models to begin with.

    Raises UserError if the folder is no bundle with a decoder and a diffusion prior.
    """
    found = [name for name in MODELS if (bundle / name / "config.json").is_file()]
    if missing := {"diffusion_prior", "decoder"} - set(found):
        raise UserError(
            f"{bundle}: no {' and no '.join(sorted(missing))} there to go on from; name a bundle's folder or a run's "
            "output folder"
        )
    recipes = make_config({"project": "any", "preset": preset, "store": "any", "source": {"paths": ["any"]}})
    values: dict[str, dict[str, Any]] = {"clip": {"weights": f"local-dir:{bundle / 'clip'}"}}
    values |= {name: _values(bundle / name, getattr(recipes, name)) for name in found}
    batch = recipes.decoder.batch
    values["evaluation"] = {"early": max(1, values["decoder"]["samples"] // batch // EARLY) * batch}
    return values


def _values(folder: Path, recipe: Any) -> dict[str, Any]:
    batches = max(SHORTEST, recipe.samples // recipe.batch // LENGTH)
    values: dict[str, Any] = {
        "init_from": str(folder / "model.safetensors"),
        "samples": batches * recipe.batch,
        "learning_rate": recipe.learning_rate / RATE,
        "warmup": min(WARMUP, batches // SHORTEST) * recipe.batch,
    }
    model = json.loads((folder / "config.json").read_text())["config"]
    usual = json.loads(json.dumps(asdict(recipe.model)))
    other = {name: value for name, value in model.items() if value != usual.get(name)}
    return values | ({"model": other} if other else {})
