"""The stage of samples: images of a list of captions, drawn with the bundle of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeInt

from pipeline.graph.artifacts import Artifact
from pipeline.graph.ray import on_a_gpu
from pipeline.graph.stages import Context, Stage


@dataclass(frozen=True)
class SamplesRecipe:
    """Says which images to draw at the end of a run; how to sample stands in the bundle.

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


SAMPLES = Stage("samples", version=6, recipe=SamplesRecipe, inputs=("bundle",), run=run_samples, kind="result")
