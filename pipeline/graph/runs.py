"""What a project's runs asked for: to say why something is stale now, and what is still needed."""

from __future__ import annotations

import calendar
import dataclasses
import secrets
import shlex
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.graph.damage import create_record, read_record
from pipeline.graph.keys import flatten, trajectory
from pipeline.graph.plan import Verdict
from pipeline.graph.stages import Context, Graph
from pipeline.store import Store
from pipeline.store.records import whoami

OURS = ("unclip", "cli")  # programs whose words are recorded
AGAIN_S = 86_400  # after which a run that finds everything made is recorded again


def remember(
    store: Store,
    project: str,
    graph: Graph,
    verdicts: Sequence[Verdict],
    package: str | None = None,
    forgettings: int = 0,
    wanted: Collection[str] | None = None,
) -> None:
    """Records what a run is asked to make, before it starts.

    ``package`` is the path of the code package that is to run it; ``forgettings`` counts those in the journal that the
    verdicts were planned with (see pipeline.data.source.journal). ``wanted``: the stages that it makes; all by default.
    """
    keys = {v.stage: v.key for v in verdicts}
    stages: dict[str, dict[str, Any]] = {}
    for v in verdicts:
        stage = graph[v.stage]
        inputs = {name: keys[name] for name in stage.inputs}
        stages[v.stage] = {
            "key": v.key,
            "version": stage.version,
            "recipe": flatten(stage.recipe),
            "inputs": inputs,
        }
        if stage.kind == "training":
            stages[v.stage]["trajectory"] = trajectory(stage.name, stage.version, stage.recipe, inputs)
            trunk = dataclasses.replace(stage.recipe, decay=0)
            stages[v.stage]["trunk"] = trajectory(stage.name, stage.version, trunk, inputs)
    more = {"package": package} if package else {}
    _write(store, project, stages, forgettings, wanted=sorted(stages if wanted is None else wanted), **more)


def remember_again(
    store: Store, project: str, graph: Graph, verdicts: Sequence[Verdict], forgettings: int, wanted: Collection[str]
) -> None:
    """Records a run that finds everything made, unless the last record asks for the same and is younger than a day.

    Without it, what is in use would become what no recent run has asked for.
    """
    newest = max((entry.path for entry in store.list(f"runs/{project}/")), default=None)
    record = (read_record(store, newest) if newest else None) or {}
    asked = {"stages": {v.stage: v.key for v in verdicts}, "forgettings": forgettings, "wanted": sorted(wanted)}
    told = {
        "stages": {stage: each["key"] for stage, each in record.get("stages", {}).items()},
        "forgettings": record.get("forgettings"),
        "wanted": record.get("wanted"),
    }
    if newest is None or asked != told or time.time() - asked_at(newest) > AGAIN_S:
        remember(store, project, graph, verdicts, forgettings=forgettings, wanted=wanted)


def remember_stage(ctx: Context, project: str) -> None:
    """Records that this stage alone is asked for, before it starts."""
    inputs = {name: artifact.key for name, artifact in ctx.inputs.items()}
    asked = {"key": ctx.key, "version": ctx.version, "recipe": flatten(ctx.recipe), "inputs": inputs}
    _write(ctx.store, project, {ctx.stage: asked}, 0)


def _write(store: Store, project: str, stages: Mapping[str, Any], forgettings: int, **more: Any) -> None:
    now = time.time()
    stamp = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now))}.{int(now % 1 * 1e6):06d}"
    path = f"runs/{project}/{stamp}-{secrets.token_hex(4)}.json"
    body = {"project": project, "stages": stages, "forgettings": forgettings}
    create_record(store, path, {**body, "by": {**whoami(), "command": _command()}, **more})


def _command() -> str:
    """Returns the command line without the values of overrides, which may be private; recipes are recorded anyway."""
    program = Path(sys.argv[0]).stem
    if program not in OURS:  # a program that uses the package: its words are its own
        return program
    words = [
        word if "=" not in word else f"{word.removeprefix('--set=').partition('=')[0]}=..." for word in sys.argv[1:]
    ]
    return " ".join([program, *map(shlex.quote, words)])


def asked_at(path: str) -> float:
    """Returns when the run of this record began, in seconds since the epoch."""
    return calendar.timegm(time.strptime(path.rpartition("/")[2][:15], "%Y%m%dT%H%M%S"))


def last_run(store: Store, project: str) -> dict[str, Any]:
    """Returns key, version, recipe and input keys of the last run, by stage; empty before the first run."""
    newest = max((entry.path for entry in store.list(f"runs/{project}/")), default=None)
    record = read_record(store, newest) if newest else None
    return record["stages"] if record else {}


def last_made(ctx: Context, inputs: Sequence[str], besides: Sequence[str] = ()) -> dict[str, Artifact] | None:
    """Returns the artefacts of the context's stage and of some of its inputs, as an earlier run made them.

    It is the newest run of the project that asked for the same version and recipe, fields ``besides`` apart, and whose
    artefacts exist, or None.
    """

    def plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in recipe.items() if name not in besides}

    asked = ctx.version, plain(flatten(ctx.recipe))
    for path in sorted((entry.path for entry in ctx.store.list(f"runs/{ctx.config.project}/")), reverse=True):
        record = read_record(ctx.store, path)
        stages = record["stages"] if record else {}
        then = stages.get(ctx.stage)
        if then and (then["version"], plain(then["recipe"])) == asked:
            found = {name: load_artifact(ctx.store, name, stages[name]["key"]) for name in (ctx.stage, *inputs)}
            if all(found.values()):
                return {name: artifact for name, artifact in found.items() if artifact is not None}
    return None
