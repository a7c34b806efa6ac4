"""The stage of the evaluation: does it learn? No torch here."""

from __future__ import annotations

from pipeline.graph.artifacts import Artifact
from pipeline.graph.ray import on_a_gpu
from pipeline.graph.stages import Context

VERSION = 13


def run_evaluation(ctx: Context) -> Artifact:
    """Measures every model of the bundle on held-out rows."""
    from pipeline.evaluate.run import evaluate

    return on_a_gpu(evaluate, ctx)
