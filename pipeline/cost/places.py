"""Says on what stages will run, and which of them would take a CPU too long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.cost.estimate import Ask, Cost
from pipeline.graph.resources import amount_of
from pipeline.progress import duration

LONGEST_S = 86_400.0  # that a CPU may take for what a GPU does in minutes, unless the user wants it


def places(costs: Mapping[str, Cost], ask: Ask) -> str:
    """Returns for example "runs on 8 H100 (embeddings, decoder), 2 cores (source, pairs)"."""
    found: dict[str, list[str]] = {}
    for stage, cost in costs.items():
        found.setdefault(_place(cost, ask), []).append(stage)
    return "runs on " + ", ".join(f"{where} ({', '.join(stages)})" for where, stages in found.items())


def _place(cost: Cost, ask: Ask) -> str:
    """Returns the GPUs of a stage, or its cores."""
    if not cost.gpus:
        return amount_of(cost.cores, "core")
    return f"{cost.gpus:g} {ask.gpu}" if ask.gpu else amount_of(cost.gpus, "GPU")


def too_slow(costs: Mapping[str, Cost], ask: Ask) -> Iterator[str]:
    """Yields a line for each stage that a GPU could work on and that takes a CPU more than a day."""
    for stage, cost in costs.items():
        if ask.computes(stage) and not cost.gpus and cost.seconds > LONGEST_S:
            yield f"{stage} would take {_place(cost, ask)} about {duration(cost.seconds)}"
