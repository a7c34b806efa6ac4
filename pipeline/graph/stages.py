"""Declarations of stages, the context of a running stage, and their keys. Imports neither Ray nor torch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pipeline.graph.artifacts import Artifact
from pipeline.graph.keys import artifact_key, differences, flatten, trajectory
from pipeline.settings import RaySettings
from pipeline.store import Store
from pipeline.store.records import digest

Node = TypeVar("Node")
Recipes = Mapping[str, Mapping[str, Any]]  # flattened, by stage


@dataclass(frozen=True)
class Context:
    """Holds the inputs and settings of a running stage.

    Attributes:
        store: Store of its inputs and results.
        stage: Name of the stage, with ``version``, ``key`` and ``recipe`` as the graph has them.
        settings: The stage's run settings.
        inputs: The artefacts that it is made from, by the names that the stage declares.
        project: Name of the project.
        ray: Settings of the local Ray.
        output: Folder of the run's report and images.
        trackers: Receivers of metrics, previews and images.
        given: Value of another part of the configuration that the stage declared to read.
        work: Work times of its workers until now (see pipeline.graph.workers.WorkTimes).
        began: Beginning of the stage in seconds since 1970. Clocks of the machines that share the stage may differ.
        show: Called from another thread, while a training runs, with its preliminary artefact.
    """

    store: Store
    stage: str
    version: int
    key: str
    recipe: Any
    settings: Any
    inputs: Mapping[str, Artifact]
    project: str = ""
    ray: RaySettings = dataclasses.field(default_factory=RaySettings)
    output: str = "out"
    trackers: tuple[str, ...] = ()
    given: Any = None
    work: dict[str, float] = dataclasses.field(default_factory=dict)
    began: float = dataclasses.field(default_factory=time.time)
    show: Callable[[Artifact], None] | None = None

    @property
    def input_keys(self) -> dict[str, str]:
        """Returns the keys of its inputs, by the stage that made them."""
        return {artifact.stage: artifact.key for artifact in self.inputs.values()}

    def publishable(self, **fields: Any) -> Artifact:
        """Returns an artefact of this stage with key, inputs, recipe, work and times filled in."""
        whole = max(0.0, time.time() - self.began)  # another machine's clock may be behind
        times = {**self.work, "whole_seconds": whole, **fields.pop("times", {})}
        recipe = flatten(self.recipe)
        return Artifact(self.stage, self.key, self.input_keys, recipe, times=times, version=self.version, **fields)


Kind = Literal["source", "data", "training", "bundle", "result"]


@dataclass(frozen=True)
class Stage:
    """Declares a stage: everything that the rest of the pipeline needs to know of it.

    A declaration holds for all configurations. ``bound`` makes the stage of one configuration, with values in place of
    classes and functions.

    Attributes:
        name: Name of its artefacts, of its section in the configuration, and of its settings under ``run``.
        version: Number that is raised when the code makes something else of the same recipe and inputs.
        recipe: Class of the recipe, a frozen dataclass. Fields that differ from their defaults are part of the key.
        inputs: Names of stages before it.
        run: Makes the artefact.
        kind: "source": its key comes from the content of the user's list. "data": makes shards from rows. "training":
            trains a model from a trajectory's checkpoints, with a ``TrainingRecipe``. "bundle": gathers models.
            "result": is drawn from a bundle.
        pinned: The first artefact made stays in use when rows are appended.
        settings: Class of the run settings; None where the stage runs in the driver and has none.
        needs: Function of the stage, with its recipe, and of the configuration that returns the inputs.
        section: Section of the configuration that holds the recipe, if it is another stage's. A recipe that is a base
            class of that stage's takes its own fields alone.
        fits: Function of the same two that raises UserError for other sections that the recipe does not fit.
        given: Function of the configuration that returns what the stage reads while it runs, outside its key.
        clips: Fields of the recipe that may name a CLIP of somebody else's.
        ready: Function of the stage that raises UserError for its recipe before anything is made; it may import torch.
        check: Raises UserError, as soon as all inputs are there, for what the stage cannot be made of.
        warn: Function of the stage and of the scanned list that yields what will be missed.
        show: Function of the store and of the artefact that returns the stage's section of the report: numbers, text
            and images, as encoded bytes, by name.
        counts_list: The ledger counts all rows of the list that earlier stages kept.
        row_seconds: Function of the recipe and of the number of rows that returns the seconds of one core that a row
            takes, for estimates before anything was measured, and how that grows with the rows.
        row_bytes: Function of the recipe, the number of rows and the dimension of an embedding that returns the bytes
            that are stored for a row, likewise.
        passes_of: Function of all recipes and of the number of held-out rows that returns the forward passes of each
            network that the stage draws with, by the stage that trained it.
        few: Function of the recipe that returns fields for a probe of little work, or where its second argument is
            true, of somewhat more.
        stands_for: Function of the recipe that returns the stage whose place this one takes: stages after it that
            declare that one as an input read this one.
        roles: Declared names of those inputs that stand for others, by input; ``build`` sets them.
        on_demand: Made only where a later stage needs it, as trainings and what is pinned always are.
    """

    name: str
    version: int
    recipe: Any
    inputs: tuple[str, ...]
    run: Callable[[Context], Artifact]
    kind: Kind = "data"
    pinned: bool = False
    settings: Any = None
    needs: Callable[[Stage, Any], tuple[str, ...]] | None = None
    section: str = ""
    fits: Callable[[Stage, Any], None] | None = None
    given: Any = None
    clips: tuple[str, ...] = ()
    ready: Callable[[Stage], None] | None = None
    check: Callable[[Context], None] | None = None
    warn: Callable[[Stage, Any], Iterator[str]] | None = None
    show: Callable[[Store, Artifact], Mapping[str, Any]] | None = None
    counts_list: bool = False
    row_seconds: Callable[[Any, float], float] | None = None
    row_bytes: Callable[[Any, int, int], float] | None = None
    passes_of: Callable[[Recipes, float], dict[str, float]] = lambda recipes, held_out: {}
    few: Callable[[Any, bool], dict[str, Any]] | None = None
    stands_for: Callable[[Any], str] | None = None
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    on_demand: bool = False

    def bound(self, config: Any) -> Stage:
        """Returns the stage with the recipe, inputs and settings that a configuration has for it."""
        recipe = getattr(config, self.section or self.name)
        if type(recipe) is not self.recipe:  # other fields of the section count in no key of this stage
            own = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(self.recipe)}
            recipe = self.recipe(**own)
        stage = dataclasses.replace(
            self,
            recipe=recipe,
            settings=self.settings and getattr(config.run, self.name),
            given=self.given and self.given(config),
        )
        return dataclasses.replace(stage, inputs=self.needs(stage, config)) if self.needs else stage


Graph = Mapping[str, Stage]


def stage_key(stage: Stage, inputs: Mapping[str, str]) -> str:
    """Returns the key of a stage's artefact, given the keys of its inputs and maybe others."""
    return artifact_key(stage.name, stage.version, stage.recipe, {name: inputs[name] for name in stage.inputs})


def shard_key(ctx: Context, inputs: Mapping[str, str]) -> str:
    """Returns the key of one shard, from the recipe, the keys of input shards, and the keys of inputs taken whole."""
    return digest(["shard", ctx.stage, ctx.version, differences(ctx.recipe), sorted(inputs.items())])


def trajectory_key(ctx: Context) -> str:
    """Returns the key of a training without its stop, which owns the checkpoints.

    Raising ``samples`` so continues a training. A learning rate that falls to the stop makes the stop count: that
    training branches off.
    """
    return trajectory(ctx.stage, ctx.version, ctx.recipe, ctx.input_keys)


def trunk_key(ctx: Context) -> str:
    """Returns the trajectory of the same training before its learning rate decays; the same if it never does."""
    return trajectory(ctx.stage, ctx.version, dataclasses.replace(ctx.recipe, decay=0), ctx.input_keys)


def ordered(graph: Graph) -> Iterator[Stage]:
    """Yields stages with inputs before those that need them. Raises ValueError if ``build`` has another order."""
    seen: set[str] = set()
    for stage in graph.values():
        if missing := set(stage.inputs) - seen:
            raise ValueError(f"stage {stage.name} comes before its inputs {sorted(missing)}")
        seen.add(stage.name)
        yield stage


def standing_for(graph: Graph, name: str) -> str:
    """Returns the stage that takes the place of another in a graph; the other itself where none does."""
    standing = (stage for stage in graph.values() if stage.stands_for and stage.stands_for(stage.recipe) == name)
    return next((stage.name for stage in standing), name)


def seconds_to_end(graph: Graph, seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns the seconds from a stage's beginning to the end of the slowest chain that needs it, by stage.

    ``seconds`` are what stages take; those that are not named take none. To begin by the largest is list
    scheduling by the critical path (Graham, 1969).
    """
    left: dict[str, float] = {}
    for stage in reversed(list(ordered(graph))):
        after = [left[other.name] for other in graph.values() if stage.name in other.inputs]
        left[stage.name] = seconds.get(stage.name, 0.0) + max(after, default=0.0)
    return left


def transitive_reduction(inputs: Mapping[Node, Sequence[Node]]) -> dict[Node, list[Node]]:
    """Returns each node's inputs in the transitive reduction: without those that it has through other inputs, too."""
    reached: dict[Node, set[Node]] = {}

    def before(node: Node) -> set[Node]:
        if node not in reached:
            reached[node] = set(inputs[node]).union(*(before(i) for i in inputs[node]))
        return reached[node]

    return {node: [i for i in own if not any(i in before(other) for other in own)] for node, own in inputs.items()}
