"""The stage of the evaluation: does it learn?"""

from __future__ import annotations

from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Context

VERSION = 8


def run_evaluation(ctx: Context) -> Artifact:
    """Measures every model of the bundle on held-out rows."""
    from pipeline.evaluate.run import evaluate

    return evaluate(ctx)
