"""Proposes how to begin with a list, and estimates what that takes on this machine and on GPUs that people have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.build import build
from pipeline.config import Config
from pipeline.cost.devices import Fleet
from pipeline.cost.estimate import PlanInput, estimate
from pipeline.cost.limits import impossible
from pipeline.cost.schedule import elapsed
from pipeline.data.pairs.preview import ListPreview
from pipeline.data.source.recipe import SourceRecipe
from pipeline.errors import UserError
from pipeline.graph.resources import Machine, amount_of
from pipeline.parse import load_yaml
from pipeline.starter import starter

GPUS = ("RTX 4090", "RTX 3060", "L4")  # that people have at home or rent for little
SMALL = "most of it is starting and compiling; a GPU gains with longer trainings"
MAC_CORES = 8  # of Apple's smaller chips; torch runs nothing of ours on their GPU


@dataclass(frozen=True)
class Proposal:
    """Holds the values that ``unclip init`` would write for a list, had it seen the sizes of the sample's images.

    Attributes:
        preset: Name of the preset.
        scale: Factor of all samples.
        weights: CLIP to start from; "" where one is trained on these pairs.
        models: Models to train besides CLIP.
        size: Side of the images to draw, pixels.
    """

    preset: str
    scale: float
    weights: str
    models: tuple[str, ...]
    size: int

    def __str__(self) -> str:
        shortened = f", scale {self.scale:g}" if self.scale != 1 else ""
        clip = f"clip.weights {self.weights}" if self.weights else "a CLIP of its own"
        return f"preset {self.preset}{shortened}, {clip}, {', '.join(self.models)}; images of {self.size} px"


@dataclass(frozen=True)
class PlacedEstimate:
    """Holds what a whole run takes in one place.

    Attributes:
        where: Place, such as "RTX 4090".
        recipe: Configuration that is run there, such as "preset small, scale 0.02".
        seconds: Seconds of the run; None where they cannot be estimated.
        lacks: Missing memory and the like, and what to do, a sentence each.
    """

    where: str
    recipe: str
    seconds: float | None
    lacks: tuple[str, ...] = ()


def propose(source: SourceRecipe, seen: ListPreview, gpu: bool) -> tuple[Proposal, Mapping[str, Any]]:
    """Returns what to begin with, and the values of its configuration, whose paths count from the current folder."""
    values = load_yaml(starter("look", gpu, source, seen))
    bundle = values["bundle"]
    clip = values.get("clip") or {}
    found = Proposal(
        values["preset"],
        float(values.get("scale", 1)),
        clip.get("weights", ""),
        tuple(bundle["models"]),
        bundle["sampling"]["size"],
    )
    return found, values


def estimates(
    here: tuple[Config, str], with_gpu: tuple[Config, str], rows: int, held_out: float, machine: Machine
) -> Iterator[PlacedEstimate]:
    """Yields what a run takes on this machine, on each of GPUS, and on a Mac.

    Args:
        here: Configuration for a machine like this one, and what it is in words.
        with_gpu: The same for a GPU.
        rows: Pairs of the list.
        held_out: Share of them that an evaluation may look at.
        machine: This machine.
    """
    what = machine.gpu or amount_of(machine.cpus, "core")
    yield _estimate(f"this machine ({what})", *here, rows, held_out, machine)
    cards = [_estimate(name, *with_gpu, rows, held_out, machine, Fleet(1, name)) for name in GPUS]
    macs = []
    if not machine.gpus:
        where = f"a Mac ({MAC_CORES} cores; its GPU is not used)"
        macs = [_estimate(where, *here, rows, held_out, machine, cores=MAC_CORES)]
    for card in cards:
        same = (mac.seconds for mac in macs if mac.seconds is not None and mac.recipe == card.recipe)
        slower = card.seconds is not None and card.seconds >= min(same, default=math.inf)
        yield replace(card, lacks=(*card.lacks, SMALL)) if slower else card
    yield from macs


def _estimate(
    where: str,
    config: Config,
    recipe: str,
    rows: int,
    held_out: float,
    machine: Machine,
    fleet: Fleet | None = None,
    cores: float = 0.0,
) -> PlacedEstimate:
    """Returns what a run takes; with ``cores``, on that many like this machine's."""
    ask = PlanInput(config, build(config), rows, held_out, fleet=fleet, machine=machine, looked=True)
    try:
        costs = {stage: estimate(stage, ask) for stage in ask.graph}
        lacks = () if cores else tuple(map(str, impossible(costs, ask)))
    except UserError as e:  # of a CLIP that is nowhere
        return PlacedEstimate(where, recipe, None, (str(e),))
    work = sum(cost.seconds * max(1.0, cost.cores) for cost in costs.values())
    return PlacedEstimate(where, recipe, work / cores if cores else elapsed(costs, ask), lacks)
