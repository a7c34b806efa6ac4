"""Says of each model whose claims do not hold whether to train it longer, how, and for how much longer."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import RUN_FILE
from pipeline.graph.artifacts import Artifact
from pipeline.progress import duration
from pipeline.report.charts import Point
from pipeline.report.inputs import ReportInput
from pipeline.report.training import read_curve

LEVEL = 0.01  # share of a loss: a change below it is none
LONGER = 4  # times as many samples, where a loss still falls
LAST = 0.75  # share of a training behind which that is looked at


def train_longer(given: ReportInput, output: str) -> list[str]:
    """Returns a sentence for each model of which a claim does not hold, as far as its losses were recorded.

    Its command runs the configuration of the last run, whose output folder is ``output``: a command with the file of
    the user would need the overrides of that run, too, and ``scale`` would count for the samples that it names.
    """
    made = given.artifacts.get("evaluation")
    figures = made.metrics["figures"] if made else ()
    failing = dict.fromkeys(figure["model"] for figure in figures if figure["holds"] is False)
    found = [given.artifacts[name] for name in failing if name in given.artifacts]
    return [said for each in found if "metrics.jsonl" in each.blobs and (said := _advice(given, each, output))]


def _advice(given: ReportInput, trained: Artifact, output: str) -> str:
    """Returns "" where too few losses were recorded to tell."""
    curve = read_curve(given.read(trained.blobs["metrics.jsonl"]))
    samples, stage = trained.recipe["samples"], trained.stage
    # A rate that falls to zero lowers a loss by itself.
    decay = trained.recipe.get("decay", 0)
    points = [point for point in curve.validation if point[0] <= samples - decay]
    change = _late_change(points)
    if change is None:
        return ""
    if change > LEVEL:
        return f"{stage}: its validation loss rises; more pairs or dropout help, more samples do not."
    if change >= -LEVEL:
        return f"{stage}: its validation loss has levelled off; more pairs or a larger preset help more than samples."
    pace = trained.times.get("samples_per_second")
    more = f", about {duration((LONGER - 1) * samples / pace)} more" if pace else ""
    words = [f"{stage}.samples={LONGER * samples}", *[f"{stage}.decay={LONGER * decay}"] * bool(decay)]
    command = shlex.join(["unclip", "run", str(Path(output, RUN_FILE)), *words])
    return (
        f"{stage}: its validation loss still fell, by {-change:.0%} over the last quarter; train it longer: "
        f"{command}{more}."
    )


def _late_change(points: Sequence[Point]) -> float | None:
    """Returns by which share a loss has changed over the last quarter of its samples; None for fewer than 3 points."""
    ordered = sorted(points)
    if len(ordered) < 3:
        return None
    end, last = ordered[-1]
    before = [loss for at, loss in ordered if at <= LAST * end]
    return last / before[-1] - 1 if before and before[-1] > 0 else None
