"""The stage of samples: images of a list of captions, drawn with the bundle of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeInt

from models.sampling_config import PRIORS, UPSAMPLERS
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.graph.ray import on_a_gpu
from pipeline.graph.stages import Context, Recipes, Stage
from pipeline.sampling.bundle import passes_of_a_row


@dataclass(frozen=True)
class SamplesRecipe:
    """Holds the captions to draw at the end of a run; sampling options are the bundle's.

    Attributes:
        captions: Captions to draw, one image each.
        seed: Seed of the first image; image i uses seed + i.
    """

    captions: Annotated[tuple[str, ...], Field(min_length=1)] = ("a red heart",)
    seed: NonNegativeInt = 0


def run_samples(ctx: Context) -> Artifact:
    """Draws every caption of the recipe."""
    from pipeline.sampling.drawing import publish_samples

    return on_a_gpu(publish_samples, ctx)


def _can_be_read(stage: Stage) -> None:
    from models.tokens import check_captions  # loads torch

    try:
        check_captions(stage.recipe.captions)
    except ValueError as e:
        raise UserError(f"samples.captions: {e}") from None


def _passes(recipes: Recipes, _: float) -> dict[str, float]:
    bundle = recipes["bundle"]
    counts = {PRIORS[bundle["sampling.prior"]]: float(bundle["sampling.candidates"]), "decoder": 1.0}
    drawn = [n for n, side in UPSAMPLERS.items() if n in bundle["models"] and side <= bundle["sampling.size"]]
    counts |= {name: recipes[name]["model.crop"] ** -2 for name in drawn}  # of whole images, and trained on crops
    captions = len(recipes["samples"]["captions"])
    return {name: captions * count * passes_of_a_row(name, recipes) for name, count in counts.items()}


SAMPLES = Stage(
    "samples",
    version=6,
    recipe=SamplesRecipe,
    inputs=("bundle",),
    run=run_samples,
    kind="result",
    ready=_can_be_read,
    passes_of=_passes,
    few=lambda recipe, more: {"captions": (recipe.captions * 4)[: 4 if more else 1]},
)
