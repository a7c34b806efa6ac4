"""Says which stages are fresh, pinned or stale, and why. Runs no stage, and imports neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import load_artifact
from pipeline.graph.keys import flatten, recipe_changes
from pipeline.graph.records import Pin, PlannedStage
from pipeline.graph.stages import Graph, Stage, ordered, stage_key
from pipeline.store import Store
from pipeline.store.records import digest, read_plain


@dataclass(frozen=True)
class Verdict:
    """Holds the state of one stage: fresh, pinned or stale, and why. ``lineage`` names its pin."""

    stage: str
    key: str
    state: str
    because: str = ""
    lineage: str | None = None


def pin_path(lineage: str) -> str:
    """Returns the path of a lineage's pin in the store."""
    return f"locks/{lineage}.json"


def read_pin(store: Store, path: str) -> str | None:
    """Returns the key that the pin at a path names, or None without a pin. Raises UserError if it is damaged."""
    try:
        pin = read_plain(store, path, Pin)
    except CorruptObject:
        raise UserError(
            f"{store.url}/{path} is damaged, so the key that it pins is lost: delete it, and pin again"
        ) from None
    return pin.key if pin else None


def plan(
    graph: Graph,
    source_keys: Mapping[str, str],
    project: str,
    store: Store,
    previous: Mapping[str, PlannedStage],
    supposed: Mapping[str, str | None] = MappingProxyType({}),
) -> list[Verdict]:
    """Returns one verdict a stage, in order. Runs nothing and writes nothing.

    Args:
        graph: Stages of the project.
        source_keys: Keys of the stages that read the list.
        project: Name of the project.
        store: Store of artefacts and pins.
        previous: Plan of the project's last run by stage (see pipeline.graph.runs), for the reason of a stale stage.
        supposed: Pins by lineage that count in place of those in the store, None for no pin.
    """
    keys: dict[str, str] = {}
    lineages: dict[str, str] = {}  # keys computed with the project's name, and the splits, in place of the source
    verdicts: list[Verdict] = []
    for stage in ordered(graph):
        own = source_keys[stage.name] if stage.kind == "source" else stage_key(stage, keys)
        # The splits count in a lineage: with others, a pinned model may have been trained on rows now held out.
        if stage.kind == "source":
            lineage = digest([project, stage.name, *stage.recipe.splitting])
        else:
            lineage = stage_key(stage, lineages)
        pin = None
        if stage.pinned:
            pin = supposed[lineage] if lineage in supposed else read_pin(store, pin_path(lineage))
        keys[stage.name] = pin or own
        # Stages after a pinned one count it with its real key, so a new CLIP starts new lineages.
        lineages[stage.name] = keys[stage.name] if stage.pinned else lineage
        if load_artifact(store, stage.name, keys[stage.name]) is not None:
            state, because = ("pinned", "stands for the data it was made from") if pin and pin != own else ("fresh", "")
        else:
            state, because = "stale", _because(stage, keys, previous.get(stage.name))
        verdicts.append(Verdict(stage.name, keys[stage.name], state, because, lineage if stage.pinned else None))
    return verdicts


def _because(stage: Stage, keys: Mapping[str, str], before: PlannedStage | None) -> str:
    """Returns why a stage is stale, in the words of the user's configuration."""
    if before is None:
        return "not made yet"
    if before.key == keys[stage.name]:
        return "not finished yet"
    if before.version != stage.version:
        return f"its code changed (version {before.version} -> {stage.version})"
    changed = recipe_changes(before.recipe, flatten(stage.recipe))
    if changed:
        return ", ".join(changed)
    if stage.kind == "source":
        return "the list or its images changed"
    inputs = [name for name in stage.inputs if before.inputs.get(name) != keys[name]]
    return f"{', '.join(inputs)} changed"
