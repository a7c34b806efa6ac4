"""What stages took when they were made, as their artefacts record it, and how that scales to other amounts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.graph.keys import flatten
from pipeline.graph.runs import last_run
from pipeline.graph.stages import Graph, Recipes
from pipeline.local import open_local
from pipeline.store import Store

SHAPING = re.compile(r"model\.(?!.*drop).+|weights|image_size|encode_format")  # fields on which a stage's speed depends


@dataclass(frozen=True)
class Observation:
    """One time that a stage was made.

    Attributes:
        amount: Rows or samples.
        seconds: Seconds from the beginning of the stage to its record.
        work: Seconds of all workers together that grew with the amount.
        workers: Number of workers.
        shape: Recipe values on which the speed depends, besides the amount; see ``shape``.
        passes: Passes through each network, in place of the amount, of a stage that draws with a bundle.
        disk: Bytes that were stored.
        decode_seconds: Part of ``work`` in which images were decoded, where a stage records it.
        device: "cpu" or "cuda".
        utilisation: Share of the device's matrix products that a training reached (pipeline.training.timing).
    """

    amount: float
    seconds: float
    work: float
    workers: int
    shape: Mapping[str, Any]
    passes: Mapping[str, float] = field(default_factory=dict)
    disk: float = 0.0
    decode_seconds: float = 0.0
    device: str = "cpu"
    utilisation: float = 0.0


Observations = dict[str, list[Observation]]  # by stage


def observe(store: Store, project: str, graph: Graph, held_out: float) -> Observations:
    """Returns what the artefacts of a project's last run record, for stages of ``graph`` and as far as they exist.

    Args:
        store: Has the artefacts.
        project: The name of the project.
        graph: The stages that are planned.
        held_out: The share of the list's rows that an evaluation may look at.
    """
    asked = last_run(store, project)
    recipes = {name: stage.recipe for name, stage in asked.items()}  # also of models that the graph has no longer
    made = {name: load_artifact(store, name, stage.key) for name, stage in asked.items() if name in graph}
    rows = made["pairs"].ledger.rows if made.get("pairs") else 0  # type: ignore[union-attr]
    found = {name: _observed(artifact, graph, recipes, rows, held_out) for name, artifact in made.items() if artifact}
    return {name: [one] for name, one in found.items() if one}


def read_profile(path: Path, graph: Graph) -> Observations:
    """Returns what ``make gpu-check`` measured, of trainings in ``graph`` whose models are those that it measured.

    Raises UserError for a file that it did not write, and where no training has the same model.
    """
    try:
        with open_local(path) as file:
            document = json.load(file)
        kind, preset, measured = (document[name] for name in ("kind", "preset", "profile"))
        rates = {
            stage: (_shaping(one["recipe"]), float(one["rows_per_second"]), float(one["utilisation"]))
            for stage, one in measured.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        why = getattr(e, "strerror", None) or e
        raise UserError(f"--profile {path}: not a result of make gpu-check ({why}); name its gpu-check.json") from e
    recipes = {name: flatten(stage.recipe) for name, stage in graph.items()}
    found: Observations = {}
    for stage, (model, rate, utilisation) in rates.items():
        if stage in graph and _shaping(recipes[stage]) == model:
            like = shape(stage, graph, recipes)
            found[stage] = [Observation(rate, 1.0, 1.0, 1, like, device=kind, utilisation=utilisation)]
    if not found:
        raise UserError(
            f"--profile {path}: it measured the models of preset {preset}, none of which is trained here; run make "
            "gpu-check with the preset of this configuration"
        )
    return found


def _observed(artifact: Artifact, graph: Graph, recipes: Recipes, rows: int, held_out: float) -> Observation | None:
    """Returns None where nothing was done, because another run had done it."""
    times, stage = artifact.times, artifact.stage
    seconds = max(times.get("whole_seconds", 0.0), times["seconds"])
    workers = max(1, int(times.get("workers", artifact.environment.get("workers", 1))))
    amount, work, passes = float(rows), seconds * workers, {}
    if "made_rows" in times:
        amount = rows * min(1.0, times["made_rows"] / max(1, artifact.ledger.rows))
        work = min(times.get("busy_seconds", 0.0), work)  # none where nothing was left to make
    elif "samples_per_second" in times:
        amount = artifact.metrics["samples_seen"]
        work = times["seconds"] * (1 - times.get("share_pause", 0.0)) * workers
    elif graph[stage].kind == "training":  # weights that were fetched
        amount, work = 1.0, 0.0
    elif graph[stage].kind == "result":
        passes = graph[stage].passes_of(recipes, held_out * rows)
        if not any(passes.values()):  # an evaluation of too few rows says nothing of one that measures
            return None
    if not amount:
        return None
    return Observation(
        amount,
        seconds,
        work,
        workers,
        shape(stage, graph, recipes),
        passes,
        times.get("written_bytes", 0.0),
        times.get("decode_seconds", 0.0),
        artifact.environment.get("device", "cpu").partition(":")[0],
        times.get("utilisation", 0.0),
    )


def shape(stage: str, graph: Graph, recipes: Recipes) -> dict[str, Any]:
    """Returns the recipe values on which a stage's speed depends: its own, and those of the models that it uses."""
    inputs = graph[stage].inputs
    if graph[stage].kind == "result":
        inputs = tuple(name for bundle in inputs if graph[bundle].kind == "bundle" for name in graph[bundle].inputs)
    models = (stage, *(name for name in inputs if graph[name].kind == "training"))
    return {f"{name}.{f}": value for name in models for f, value in _shaping(recipes.get(name, {})).items()}


def _shaping(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if SHAPING.fullmatch(name)}


def pace(
    points: Sequence[tuple[float, Observation]], amount: float, workers: int, least: float = 0.0
) -> tuple[float, float]:
    """Returns the seconds of start-up, and all seconds, that an amount takes.

    A straight line through the first and the last point tells the work of workers that grows from what does not; one
    point alone, or a second that says nothing, is a line through the origin. What is left of the seconds is start-up.

    Args:
        points: Observations with their amounts, the smallest first; at least one.
        amount: The amount to be made.
        workers: Number of workers to plan for.
        least: Seconds that more workers than those that were observed do not save of those that grow.
    """
    (low, first), (high, last) = points[0], points[-1]
    slope = (last.work - first.work) / (high - low) if high > low else -1.0
    start = first.work - slope * low
    if slope < 0 or start < 0:
        start, slope = 0.0, last.work / high if high else 0.0
    left = [one.seconds - (start + slope * size) / one.workers for size, one in points]
    startup = max(0.0, sum(left) / len(left)) + start / workers
    growing = slope * amount
    return startup, startup + max(growing / workers, min(least, growing / last.workers))


def paces(
    points: Sequence[tuple[float, Observation]], amount: float, workers: int, least: float = 0.0
) -> list[tuple[float, float]]:
    """Returns what ``pace`` says by each pair of a small and a large observation, in order of all seconds.

    So repeated observations of the same two amounts tell how far an estimate can be trusted. Those of one amount are
    lines through the origin, each by itself.
    """
    middle = (min(size for size, _ in points) + max(size for size, _ in points)) / 2
    small, large = ([point for point in points if (point[0] < middle) == below] for below in (True, False))
    lines = [list(pair) for pair in product(small, large)] or [[point] for point in large]
    return sorted((pace(line, amount, workers, least) for line in lines), key=lambda found: found[1])
