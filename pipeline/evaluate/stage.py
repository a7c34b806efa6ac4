"""The stage of the evaluation: does it learn? No torch here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.evaluate.metric import with_metrics
from pipeline.evaluate.recipe import EvaluationRecipe
from pipeline.graph.artifacts import Artifact
from pipeline.graph.ray import on_a_gpu
from pipeline.graph.stages import Context, Stage
from pipeline.training.stage import DECODER, LEARN


def run_evaluation(ctx: Context) -> Artifact:
    """Measures every model of the bundle on held-out rows."""
    from pipeline.evaluate.run import evaluate

    return on_a_gpu(evaluate, ctx)


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
)
