"""Records of a project's runs: they tell why a stage is stale, and which artefacts are still needed."""

from __future__ import annotations

import dataclasses
import secrets
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.graph.keys import flatten, trajectory
from pipeline.graph.plan import Verdict
from pipeline.graph.records import RUN_NAME, PlannedStage, RunRecord
from pipeline.graph.stages import Context, Graph
from pipeline.parse import SHORTHANDS
from pipeline.store import Store
from pipeline.store.base import Entry
from pipeline.store.records import create_record, peek_record, whoami

OURS = ("unclip", "cli")  # programs whose arguments are recorded
AGAIN_S = 86_400  # after which a run that finds everything made is recorded again
MOST_RUNS = 10**8 - 1  # of a project: numbers have eight digits, so that names sort as numbers do


def record_run(
    store: Store,
    project: str,
    graph: Graph,
    verdicts: Sequence[Verdict],
    package: str | None = None,
    forgettings: int = 0,
    wanted: Collection[str] | None = None,
    segments: Sequence[str] = (),
    repeated: bool = False,
) -> None:
    """Records what a run is asked to make, before it starts.

    Args:
        store: Store of the project.
        project: Name of the project.
        graph: Its stages.
        verdicts: The plan.
        package: Path of the code package that is to run it.
        forgettings: Number of those in the journal that the verdicts were planned with (see
            pipeline.data.source.journal).
        wanted: Stages that the run makes; all by default.
        segments: Names of the segments of the list.
        repeated: The run finds everything made. It is recorded unless the last record asks for the same and is younger
            than a day: garbage collection keeps what recent runs asked for, so artefacts in use need a recent run.
    """
    keys = {v.stage: v.key for v in verdicts}
    stages: dict[str, PlannedStage] = {}
    for v in verdicts:
        stage = graph[v.stage]
        inputs = {name: keys[name] for name in stage.inputs}
        owners = {}
        if stage.kind == "training":
            for name, recipe in (("trajectory", stage.recipe), ("trunk", dataclasses.replace(stage.recipe, decay=0))):
                owners[name] = trajectory(stage.name, stage.version, recipe, inputs)
        stages[v.stage] = PlannedStage(v.key, stage.version, flatten(stage.recipe), inputs, **owners, lineage=v.lineage)
    chosen = tuple(sorted(stages if wanted is None else wanted))
    run = RunRecord(project, stages, forgettings, chosen, tuple(segments), _asked_by(), package)
    entry, last = next(_runs(store, project), (None, None)) if repeated else (None, None)
    if not entry or not last or _asks(last) != _asks(run) or store.now() - entry.modified > AGAIN_S:
        _create(store, run)


def record_stage_run(ctx: Context, project: str) -> None:
    """Records that this stage alone is asked for, before it starts."""
    asked = PlannedStage(ctx.key, ctx.version, flatten(ctx.recipe), ctx.input_keys)
    _create(ctx.store, RunRecord(project, {ctx.stage: asked}, 0, (ctx.stage,), by=_asked_by()))


def _asks(run: RunRecord) -> tuple[Any, ...]:
    return {stage: each.key for stage, each in run.stages.items()}, run.forgettings, run.wanted, run.segments


def _create(store: Store, run: RunRecord) -> None:
    """Records a run under the next number. Two that begin at once may have one number; then their names decide."""
    # Numbers and not times: clocks of machines differ.
    last = max((entry.path for entry in run_entries(store, run.project)), default=None)
    number = run_number(last) + 1 if last else 1
    if number > MOST_RUNS:
        raise UserError(f"{store.url}/{last} has the last number that a run can have: delete it, and run again")
    create_record(store, f"runs/{run.project}/{number:08d}-{secrets.token_hex(4)}.json", run)


def _asked_by() -> dict[str, str]:
    return {**whoami(), "command": _command()}


def _command() -> str:
    """Returns the command line without the values of overrides, which may be private; recipes are recorded anyway.

    Values of SHORTHANDS stay: they are not secret, and tell two runs apart.
    """
    program = Path(sys.argv[0]).stem
    if program not in OURS:  # a program that uses the package: its words are its own
        return program
    words = []
    for word in sys.argv[1:]:
        name, equals, value = word.removeprefix("--set=").partition("=")
        words.append(f"{name}={value if name in SHORTHANDS else '...'}" if equals else word)
    return " ".join([program, *map(shlex.quote, words)])


def run_entries(store: Store, project: str) -> list[Entry]:
    """Returns the entries of a project's runs in a store, the first run first. Their records are not read."""
    return [entry for entry in store.list(f"runs/{project}/") if RUN_NAME.fullmatch(entry.path)]


def run_number(path: str) -> int:
    """Returns the number of a run from the path of its record. Raises ValueError for another path."""
    name = RUN_NAME.fullmatch(path)
    if name is None:
        raise ValueError(f"{path} is not the name of a run")
    return int(name["number"])


def last_run(store: Store, project: str) -> Mapping[str, PlannedStage]:
    """Returns the last run's plan by stage; empty before the first run."""
    return next((run.stages for _, run in _runs(store, project)), {})


def last_made(ctx: Context, inputs: Sequence[str], besides: Sequence[str] = ()) -> dict[str, Artifact] | None:
    """Returns the artefacts of the context's stage and of some of its inputs, as an earlier run made them.

    It is the newest run of the project that asked for the same version and recipe, fields ``besides`` apart, and whose
    artefacts exist, or None.
    """

    def plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in recipe.items() if name not in besides}

    asked = ctx.version, plain(flatten(ctx.recipe))
    for _, run in _runs(ctx.store, ctx.project):
        own = run.stages.get(ctx.stage)
        if own and (own.version, plain(own.recipe)) == asked and own.inputs.keys() >= {*inputs}:
            keys = {ctx.stage: own.key} | {name: own.inputs[name] for name in inputs}
            found = {name: load_artifact(ctx.store, name, key) for name, key in keys.items()}
            if all(found.values()):
                return {name: artifact for name, artifact in found.items() if artifact is not None}
    return None


def runs_of_lists(store: Store, project: str) -> Iterator[RunRecord]:
    """Yields the runs of a project that name the segments of their list, the last one first."""
    return (run for _, run in _runs(store, project) if run.segments)


def _runs(store: Store, project: str) -> Iterator[tuple[Entry, RunRecord]]:
    """Yields the runs of a project that can be read, the last one first."""
    for entry in reversed(run_entries(store, project)):
        if run := peek_record(store, entry.path, RunRecord):  # runs only explain, so a damaged one is passed over
            yield entry, run
