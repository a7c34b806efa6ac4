"""Shows where the results come from and what they cost: a drawing of the graph and a table of times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import NamedTuple

from markupsafe import Markup

from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import transitive_reduction
from pipeline.progress import duration
from pipeline.report.html import PARTS, Section, attempt, number, template

BOX, TALL, ACROSS, DOWN = 124, 52, 12, 34  # SVG units: width and height of a box, the space between boxes
LINEAGE = template("lineage.html")


class Box(NamedTuple):
    """A stage in the drawing: the lines of its box, and the middle of the top of the box."""

    words: tuple[str, str, str]
    x: float
    y: float


def lineage_section(artifacts: Mapping[str, Artifact]) -> Markup:
    """Shows the graph of what is made and its cost; empty before anything is."""
    if not artifacts:
        return Markup()
    drawing = attempt("The drawing of the lineage", draw_lineage, artifacts)
    parts = [attempt("The table of stages", _stages, artifacts), PARTS.folded("The graph", drawing)]
    return Section.of(LINEAGE.lineage, "lineage", "Lineage and cost", parts)


def direct_inputs(artifacts: Mapping[str, Artifact]) -> dict[str, list[str]]:
    """Returns of each stage the inputs that it does not also have through another of its inputs."""
    return transitive_reduction({name: [i for i in made.inputs if i in artifacts] for name, made in artifacts.items()})


def levels(inputs: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Groups stages by the longest way from a stage without inputs, so that every arrow points down."""
    sorter = TopologicalSorter(inputs)
    sorter.prepare()
    rows = []
    while sorter.is_active():
        rows.append(list(sorter.get_ready()))
        sorter.done(*rows[-1])
    return rows


def draw_lineage(artifacts: Mapping[str, Artifact]) -> Markup:
    """Draws the graph as SVG, from top to bottom: a box a stage with its key and its time."""
    if not artifacts:
        raise ValueError("nothing is made yet")
    inputs = direct_inputs(artifacts)
    rows = levels(inputs)
    width = max(map(len, rows)) * (BOX + ACROSS) + ACROSS
    boxes: dict[str, Box] = {}
    for i, row in enumerate(rows):
        wanted = {
            name: sum(boxes[p].x for p in inputs[name]) / len(inputs[name]) if inputs[name] else width / 2
            for name in row
        }
        # Below what they come from, side by side, and inside.
        left = sum(wanted.values()) / len(row) - (len(row) - 1) * (BOX + ACROSS) / 2
        most = width - ACROSS - BOX / 2 - (len(row) - 1) * (BOX + ACROSS)
        left = min(max(left, ACROSS + BOX / 2), most)
        for j, name in enumerate(sorted(row, key=lambda name: wanted[name])):
            boxes[name] = Box(_words(name, artifacts[name]), left + j * (BOX + ACROSS), ACROSS + i * (TALL + DOWN))
    arrows = [(boxes[parent], boxes[name]) for name in inputs for parent in inputs[name]]
    said = "; ".join(f"{name} from {', '.join(own)}" for name, own in inputs.items() if own) or ", ".join(inputs)
    height = len(rows) * (TALL + DOWN) - DOWN + 2 * ACROSS
    return LINEAGE.drawing(said, (width, height), arrows, boxes.values(), (BOX, TALL))


def _words(name: str, artifact: Artifact) -> tuple[str, str, str]:
    took = artifact.times.get("seconds")
    return name, artifact.key[:12], "" if took is None else duration(took)


def worker_hours(artifact: Artifact) -> float:
    """Returns workers times hours that a stage took when it was made."""
    return _workers(artifact) * artifact.times["seconds"] / 3600


def _workers(artifact: Artifact) -> int:
    # Data stages record them among the times, trainings in the environment.
    return max(1, int(artifact.times.get("workers", artifact.environment.get("workers", 1))))


def _stages(artifacts: Mapping[str, Artifact]) -> Markup:
    """Shows key, amount, time, workers and bytes of every stage, and their sum."""
    rows, total = [], 0.0
    for name, artifact in artifacts.items():
        took, hours = artifact.times, ""
        amount = artifact.metrics.get("samples_seen", artifact.ledger.kept)
        if "seconds" in took:
            total += worker_hours(artifact)
            hours = f"{worker_hours(artifact):.2f}"
        written = number(took["written_bytes"] / 1e6) if took.get("written_bytes") else ""
        rate = number(took["samples_per_second"]) if "samples_per_second" in took else ""
        used = f"{took['utilisation']:.0%}" if took.get("utilisation") else ""
        long = duration(took["seconds"]) if hours else ""
        amounts = number(amount) if amount else "", long, number(_workers(artifact)), hours, written, rate, used
        rows.append((name, artifact.key[:12], *amounts))
    return LINEAGE.stages([*rows, ("all", "", "", "", "", f"{total:.2f}", "", "", "")])
