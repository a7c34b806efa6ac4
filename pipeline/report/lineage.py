"""Shows where the results come from and what they cost."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import transitive_reduction
from pipeline.progress import duration
from pipeline.report.html import Section, attempt, number, template

LINEAGE = template("lineage.html")


def lineage_section(artifacts: Mapping[str, Artifact]) -> Markup:
    """Shows what each stage was made from and its cost; empty before anything is."""
    if not artifacts:
        return Markup()
    return Section.of(
        LINEAGE.lineage, "lineage", "Lineage and cost", [attempt("The table of stages", _stages, artifacts)]
    )


def direct_inputs(artifacts: Mapping[str, Artifact]) -> dict[str, list[str]]:
    """Returns of each stage the inputs that it does not also have through another of its inputs."""
    return transitive_reduction({name: [i for i in made.inputs if i in artifacts] for name, made in artifacts.items()})


def worker_hours(artifact: Artifact) -> float:
    """Returns workers times hours that a stage took when it was made."""
    return _workers(artifact) * artifact.times["seconds"] / 3600


def _workers(artifact: Artifact) -> int:
    # Data stages record them among the times, trainings in the environment.
    return max(1, int(artifact.times.get("workers", artifact.environment.get("workers", 1))))


def _stages(artifacts: Mapping[str, Artifact]) -> Markup:
    """Shows key, inputs, amount, time, workers and bytes of every stage, and their sum."""
    inputs = direct_inputs(artifacts)
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
        rows.append((name, artifact.key[:12], ", ".join(inputs[name]), *amounts))
    return LINEAGE.stages([*rows, ("all", "", "", "", "", "", f"{total:.2f}", "", "", "")])
