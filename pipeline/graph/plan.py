"""Stages, keys and the plan. Pure: nothing here runs a stage, and neither Ray nor torch is imported.

A key is a recipe: sha256 of the stage's name and version, the recipe fields that differ from their defaults, and the
keys of all inputs. So every key is known before anything has run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.graph.damage import pinned_key
from pipeline.store import Store
from pipeline.store.records import digest

Node = TypeVar("Node")
SOURCES = ("source", "captions")  # their keys come from the content of the user's list


@dataclass(frozen=True)
class Context:
    """All that a running stage is given. ``work``: what workers took for it so far (see pipeline.graph.shards.Work);
    ``began``: when it was begun, seconds since 1970, on which machines that share a stage roughly agree."""

    store: Store
    stage: str
    version: int
    key: str
    recipe: Any
    settings: Any  # the stage's run settings
    inputs: Mapping[str, Artifact]
    config: Any  # the whole Config, for Ray's settings and the list of the user
    work: dict[str, float] = dataclasses.field(default_factory=dict)
    began: float = dataclasses.field(default_factory=time.time)

    def publishable(self, **fields: Any) -> Artifact:
        """An artefact of this stage with key, inputs, recipe, the work, and the time since it was begun filled in."""
        keys = {name: artifact.key for name, artifact in self.inputs.items()}
        whole = max(0.0, time.time() - self.began)
        times = {**self.work, "whole_seconds": whole, **fields.pop("times", {})}
        recipe = flatten(self.recipe)
        return Artifact(self.stage, self.key, keys, recipe, times=times, version=self.version, **fields)


@dataclass(frozen=True)
class Stage:
    """A node of the graph. ``pinned``: once made, it stands for later data too (design rule 6)."""

    name: str
    version: int
    recipe: Any
    inputs: tuple[str, ...]
    run: Callable[[Context], Artifact]
    pinned: bool = False


Graph = Mapping[str, Stage]


def differences(recipe: Any) -> dict[str, Any]:
    """The fields of a (nested) recipe dataclass that differ from their defaults, as plain JSON values."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            if inner := differences(value):
                result[field.name] = inner
            continue
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if value != default:
            result[field.name] = _plain(value)
    return result


def flatten(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """All fields of a (nested) recipe by dotted name, as plain JSON values."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            result |= flatten(value, f"{prefix}{field.name}.")
        else:
            result[prefix + field.name] = _plain(value)
    return result


def defaults(recipe: type, prefix: str = "") -> dict[str, Any]:
    """The defaults of a (nested) recipe dataclass by dotted name, as ``flatten`` gives values; required fields have
    none."""
    result: dict[str, Any] = {}
    hints = get_type_hints(recipe)
    for field in dataclasses.fields(recipe):
        if dataclasses.is_dataclass(hints[field.name]):
            result |= defaults(hints[field.name], f"{prefix}{field.name}.")
        elif field.default_factory is not dataclasses.MISSING:
            result[prefix + field.name] = _plain(field.default_factory())
        elif field.default is not dataclasses.MISSING:
            result[prefix + field.name] = _plain(field.default)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def artifact_key(stage: str, version: int, recipe: Any, inputs: Mapping[str, str]) -> str:
    """The key of an artefact, given the keys of its inputs in the order in which its stage names them."""
    return digest([stage, version, differences(recipe), [[name, key] for name, key in inputs.items()]])


def stage_key(stage: Stage, inputs: Mapping[str, str]) -> str:
    """The key of a stage's artefact, given the keys of its inputs and maybe others."""
    return artifact_key(stage.name, stage.version, stage.recipe, {name: inputs[name] for name in stage.inputs})


def shard_key(ctx: Context, inputs: Mapping[str, str]) -> str:
    """The key of one shard: the stage's recipe, the input shards' keys, and the keys of inputs taken whole."""
    return digest(["shard", ctx.stage, ctx.version, differences(ctx.recipe), sorted(inputs.items())])


def trajectory_key(ctx: Context) -> str:
    """The key of a training without its stop, which owns the checkpoints (design 8: length is not identity).

    A learning rate that falls to the stop makes the stop count: that training branches off.
    """
    return trajectory(ctx.stage, ctx.version, ctx.recipe, {name: made.key for name, made in ctx.inputs.items()})


def trunk_key(ctx: Context) -> str:
    """The trajectory of the same training while its learning rate does not fall; the same if it never does."""
    inputs = {name: made.key for name, made in ctx.inputs.items()}
    return trajectory(ctx.stage, ctx.version, dataclasses.replace(ctx.recipe, decay=0), inputs)


def trajectory(stage: str, version: int, recipe: Any, inputs: Mapping[str, str]) -> str:
    """The trajectory of a training before its inputs are made: from their keys."""
    differing = {k: v for k, v in differences(recipe).items() if k != "samples" or recipe.decay}
    return digest(["trajectory", stage, version, differing, sorted(inputs.items())])


@dataclass(frozen=True)
class Verdict:
    """What the plan says of one stage: fresh, pinned or stale, and why. ``lineage`` names its pin."""

    stage: str
    key: str
    state: str
    because: str = ""
    lineage: str | None = None


def ordered(graph: Graph) -> Iterator[Stage]:
    """Stages with inputs before those that need them. ``build`` writes them in that order already; this checks it."""
    seen: set[str] = set()
    for stage in graph.values():
        if missing := set(stage.inputs) - seen:
            raise ValueError(f"stage {stage.name} comes before its inputs {sorted(missing)}")
        seen.add(stage.name)
        yield stage


def direct(inputs: Mapping[Node, Sequence[Node]]) -> dict[Node, list[Node]]:
    """Of each node of a graph the inputs that it does not also have through another of its inputs."""
    reached: dict[Node, set[Node]] = {}

    def before(node: Node) -> set[Node]:
        if node not in reached:
            reached[node] = set(inputs[node]).union(*(before(i) for i in inputs[node]))
        return reached[node]

    return {node: [i for i in own if not any(i in before(other) for other in own)] for node, own in inputs.items()}


def pin_path(lineage: str) -> str:
    return f"locks/{lineage}.json"


def read_pin(store: Store, lineage: str) -> str | None:
    """Returns the key that a lineage is pinned to, or None. Raises UserError if the pin is damaged."""
    try:
        return pinned_key(store, pin_path(lineage))
    except FileNotFoundError:
        return None


def plan(
    graph: Graph,
    source_keys: Mapping[str, str],
    project: str,
    store: Store,
    previous: Mapping[str, Any],
    supposed: Mapping[str, str | None] = MappingProxyType({}),
) -> list[Verdict]:
    """One verdict a stage, in order. Runs nothing and writes nothing.

    ``previous`` holds what the project's last run asked for, stage by stage (see pipeline.graph.runs), and only serves
    to say why a stage is stale. ``supposed``: keys that count as the pins of some lineages in place of those in the
    store, None for no pin.
    """
    keys: dict[str, str] = {}
    lineages: dict[str, str] = {}  # keys computed with the project's name in place of the source
    verdicts: list[Verdict] = []
    for stage in ordered(graph):
        own = source_keys[stage.name] if stage.name in SOURCES else stage_key(stage, keys)
        lineage = stage_key(stage, lineages) if stage.name not in SOURCES else digest([project, stage.name])
        pin = None
        if stage.pinned:
            pin = supposed[lineage] if lineage in supposed else read_pin(store, lineage)
        keys[stage.name] = pin or own
        # What comes after a pinned stage counts it with its real key, so a new CLIP starts new lineages.
        lineages[stage.name] = keys[stage.name] if stage.pinned else lineage
        if load_artifact(store, stage.name, keys[stage.name]) is not None:
            state, because = ("pinned", "stands for the data it was made from") if pin and pin != own else ("fresh", "")
        else:
            state, because = "stale", _because(stage, keys, previous.get(stage.name), verdicts)
        verdicts.append(Verdict(stage.name, keys[stage.name], state, because, lineage if stage.pinned else None))
    return verdicts


def recipe_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two flattened recipes, such as "model.dropout 0.0 -> 0.1"."""
    names = sorted(now.keys() | then.keys())
    return [f"{k} {then.get(k)} -> {now.get(k)}" for k in names if now.get(k) != then.get(k)]


def _because(stage: Stage, keys: Mapping[str, str], before: Mapping[str, Any] | None, verdicts: list[Verdict]) -> str:
    """Why a stage is stale, in the words of the user's configuration."""
    if before is None:
        return "not made yet"
    if before["key"] == keys[stage.name]:
        return "not finished yet"
    if before["version"] != stage.version:
        return f"its code changed (version {before['version']} -> {stage.version})"
    changed = recipe_changes(before["recipe"], flatten(stage.recipe))
    if changed:
        return ", ".join(changed)
    if stage.name in SOURCES:
        return "the list changed"
    inputs = [name for name in stage.inputs if before["inputs"].get(name) != keys[name]]
    return f"{', '.join(inputs)} changed"
