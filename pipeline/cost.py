"""About how long a stage will take here: from the project's last run of it, or guessed from sizes. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.image_configs import DecoderConfig, UpsamplerConfig
from models.prior_configs import ARPriorConfig, ClipConfig, DiffusionPriorConfig
from pipeline.artifacts import load_artifact
from pipeline.graph import Stage, flatten
from pipeline.history import last_run
from pipeline.store import Store
from pipeline.training.recipes import ClipRecipe, TrainingRecipe

# A second of two ordinary cores: transformers are large matrix products, in bf16; the rest is small convolutions.
TRANSFORMER_FLOPS = 250e9
CONVOLUTION_FLOPS = 60e9
ROW_SECONDS = {
    "pairs": 0.015,
    "embeddings": 0.005,
    "thresholds": 0.0001,
    "curation": 0.0005,
    "index": 0.0001,
    "codec": 0.0005,
}
PICTURE_SECONDS = 10.0
EVALUATION_SECONDS = 60.0
LOAD_SECONDS = 60.0  # to fetch and store the weights of a CLIP that exists


@dataclass(frozen=True)
class Cost:
    """Seconds, and whether they come from a measurement of this stage in this project."""

    seconds: float
    measured: bool


def estimate(stage: Stage, rows: int, project: str, store: Store) -> Cost:
    """What making ``stage`` anew for ``rows`` pairs costs."""
    amount = _amount(stage, rows)
    before = last_run(store, project).get(stage.name)
    made = load_artifact(store, stage.name, before["key"]) if before else None
    if made is not None and before is not None and _same_size(stage, before["recipe"]):
        done = 1 if stage.name == "evaluation" else made.recipe.get("samples") or made.ledger.rows
        if done:
            return Cost(made.times["seconds"] * amount / done, True)
    return Cost(_guess(stage, amount), False)


def _amount(stage: Stage, rows: int) -> int:
    if isinstance(stage.recipe, TrainingRecipe):
        return stage.recipe.samples
    if stage.name == "evaluation":
        return 1  # of a fixed number of rows
    return len(stage.recipe.captions) if stage.name == "samples" else rows


def _same_size(stage: Stage, recipe: dict[str, Any]) -> bool:
    """A measurement holds only for a model of the same shape, and of the same origin."""
    shape = {k: v for k, v in flatten(stage.recipe).items() if k.startswith("model.") or k == "weights"}
    return all(recipe.get(k) == v for k, v in shape.items())


def _guess(stage: Stage, amount: int) -> float:
    if isinstance(stage.recipe, ClipRecipe) and stage.recipe.weights != "train":
        return LOAD_SECONDS
    if isinstance(stage.recipe, TrainingRecipe):
        model = stage.recipe.model  # type: ignore[attr-defined]
        rate = TRANSFORMER_FLOPS if isinstance(model, ARPriorConfig | DiffusionPriorConfig) else CONVOLUTION_FLOPS
        return 3 * forward_flops(model) * amount / rate
    if stage.name == "samples":
        return PICTURE_SECONDS * amount
    if stage.name == "evaluation":
        return EVALUATION_SECONDS
    return ROW_SECONDS.get(stage.name, 0.0) * amount


def forward_flops(model: Any) -> float:
    """Rough floating-point operations of one sample's forward pass, from its configuration alone."""
    if isinstance(model, ARPriorConfig):
        text = _transformer(model.text_width, model.text_depth, model.text_context)
        return text + _transformer(model.width, model.depth, model.prefix + 2 + 319)
    if isinstance(model, DiffusionPriorConfig):
        return _transformer(model.width, model.depth, model.text_context + 4)
    if isinstance(model, ClipConfig):
        text = _transformer(model.text_width, model.text_layers, model.text_context)
        if model.tower == "vit":
            return text + _transformer(model.width, model.layers[0], (model.image_size // model.patch) ** 2)
        first = model.image_size // 4
        blocks = sum(2 * 17 * (model.width * 2**i) ** 2 * (first / 2**i) ** 2 * n for i, n in enumerate(model.layers))
        return text + blocks
    if isinstance(model, DecoderConfig | UpsamplerConfig):
        share = model.crop if isinstance(model, UpsamplerConfig) else 1.0
        side = model.image_size * share / model.patch
        flops = 0.0
        for level, multiplier in enumerate(model.multipliers):
            width = model.channels * multiplier
            flops += 2 * (2 * model.depth + 1) * 2 * 9 * width**2 * (side / 2**level) ** 2 * 1.5
        return flops
    raise TypeError(f"no cost known for {type(model).__name__}")


def _transformer(width: int, depth: int, tokens: int) -> float:
    return 2.0 * 12 * width**2 * depth * tokens
