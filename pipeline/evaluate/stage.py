"""The stage of the evaluation: does it learn? No torch here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from models.sampling_config import PRIORS
from pipeline.evaluate.metric import with_metrics
from pipeline.evaluate.recipe import ROWS, EvaluationRecipe
from pipeline.graph.artifacts import Artifact
from pipeline.graph.ray import on_a_gpu
from pipeline.graph.stages import Context, Recipes, Stage
from pipeline.held_out import FEWEST, short_splits
from pipeline.sampling.bundle import passes_of_a_row
from pipeline.training.stage import DECODER, LEARN


def run_evaluation(ctx: Context) -> Artifact:
    """Measures every model of the bundle on held-out rows."""
    from pipeline.evaluate.run import evaluate

    return on_a_gpu(evaluate, ctx)


def _passes(recipes: Recipes, held_out: float) -> dict[str, float]:
    asked, models = recipes["evaluation"], recipes["bundle"]["models"]

    def some(name: str) -> int:
        return found if (found := min(asked[name], round(held_out))) >= FEWEST else 0

    priors = [name for name in models if name in PRIORS.values()]
    captions = 2 * some("image_rows")  # as many of training rows
    samples = some("rows") * asked["samples"] + captions * recipes["bundle"]["sampling.candidates"]
    counts = {"decoder": captions * (1 + len(priors)), **dict.fromkeys(priors, samples)}
    crops = some("upsampler_rows") * asked["samples"]  # as upsamplers are trained
    counts |= {name: crops for name in models if name not in counts}
    return {name: count * passes_of_a_row(name, recipes) for name, count in counts.items()}


def _few(recipe: EvaluationRecipe, more: bool) -> dict[str, int]:
    few = dict.fromkeys(ROWS, FEWEST) | {"samples": 2}
    return {name: min(getattr(recipe, name), (1 + more) * number) for name, number in few.items()}


class EvaluationStage(Stage):
    """Adds the metrics of installed packages to the recipe, and so to the key."""

    def bound(self, config: Any) -> Stage:
        """Returns the stage of a configuration. Raises UserError for a package whose metric cannot be used."""
        stage = super().bound(config)
        return replace(stage, recipe=with_metrics(stage.recipe))


EVALUATION = EvaluationStage(
    "evaluation",
    version=14,
    recipe=EvaluationRecipe,
    inputs=(*LEARN, "source", "bundle"),
    # The decoder's text tower is CLIP's where the decoder reads it.
    needs=lambda _, config: (*DECODER.bound(config).inputs, "source", "bundle"),
    run=run_evaluation,
    kind="result",
    clips=("judge",),
    warn=lambda _, found: short_splits(found.held_out),
    passes_of=_passes,
    few=_few,
)
