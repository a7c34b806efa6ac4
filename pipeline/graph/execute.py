"""Runs what the plan calls stale, stage by stage, and sets aside what turns out to be damaged."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from pipeline.errors import CorruptObject, Superseded, UserError
from pipeline.graph.artifacts import SEGMENTS, Artifact, artifact_path, load_artifact, read_shards, shard_path
from pipeline.graph.damage import set_aside
from pipeline.graph.plan import Verdict, pin_path
from pipeline.graph.stages import Context, Graph, Stage, ordered, stage_key, trajectory_key, trunk_key
from pipeline.progress import under_way
from pipeline.store import Store
from pipeline.store.crash import crash_point
from pipeline.store.leases import lead_or_wait
from pipeline.store.names import is_digest
from pipeline.store.records import blob_path

log = logging.getLogger("unclip")
NO_GRAPH: Graph = MappingProxyType({})
OnStage = Callable[[str, Artifact, Mapping[str, Artifact]], None]
OnLook = Callable[[Artifact, Mapping[str, Artifact]], None]


def execute(
    graph: Graph,
    verdicts: Sequence[Verdict],
    wanted: set[str],
    store: Store,
    config: Any,
    on_stage: OnStage,
    on_look: OnLook,
) -> dict[str, Artifact]:
    """Makes the ``wanted`` stages and everything that they need, where they are stale, and returns their artefacts.

    ``on_stage`` is called after each stage that was made, with all artefacts so far; ``on_look``, from another thread,
    while a training runs, with what it has shown (see pipeline.training.follow). Raises CorruptObject after having
    set aside a damaged object and the records that name it: plan again and call again.
    """
    artifacts: dict[str, Artifact] = {}
    keys = {verdict.stage: verdict for verdict in verdicts}
    try:
        for stage in ordered(graph):
            if stage.name not in wanted:
                continue
            verdict = keys[stage.name]
            made = load_artifact(store, stage.name, verdict.key)
            if made is None:
                if verdict.lineage is not None:
                    _check_pin(stage, verdict.key, artifacts)
                made = _run_stage(stage, verdict.key, artifacts, store, config, on_look)
                artifacts[stage.name] = made
                on_stage(stage.name, made, artifacts)
            artifacts[stage.name] = made
            if verdict.lineage is not None:
                _pin(store, verdict.lineage, verdict.key)
    except CorruptObject as e:
        heal(store, e, artifacts, graph)
        raise
    return artifacts


def make_context(stage: Stage, key: str, artifacts: Mapping[str, Artifact], store: Store, config: Any) -> Context:
    """Returns what a stage is given. ``artifacts`` hold its inputs."""
    inputs = {name: artifacts[name] for name in stage.inputs}
    settings = getattr(config.run, stage.name, stage.settings)
    return Context(store, stage.name, stage.version, key, stage.recipe, settings, inputs, config)


def _run_stage(
    stage: Stage, key: str, artifacts: Mapping[str, Artifact], store: Store, config: Any, on_look: OnLook
) -> Artifact:
    ctx = make_context(stage, key, artifacts, store, config)

    def finished() -> bool:
        return store.stat(artifact_path(stage.name, key)) is not None

    def newest() -> str:
        if stage.kind != "training":
            return ""
        folders = [f"checkpoints/{key}/" for key in (trunk_key(ctx), trajectory_key(ctx))]
        return max((entry.path for folder in folders for entry in store.list(folder)), default="")

    def run() -> Artifact:
        # It begins now, not when it began to wait for the lease.
        return stage.run(replace(ctx, began=time.time(), show=lambda running: on_look(running, artifacts)))

    while True:
        progress = partial(under_way, stage.name)
        lease = lead_or_wait(store, key, config.run.lease_s, finished, newest, stage=stage.name, progress=progress)
        if lease is not None:
            with lease:
                try:
                    return load_artifact(store, stage.name, key) or run()
                except Superseded:
                    log.warning("%s: another run has taken over; waiting for its result", stage.name)
        made = load_artifact(store, stage.name, key)
        if made is not None:
            return made


def _check_pin(stage: Stage, key: str, artifacts: Mapping[str, Artifact]) -> None:
    """Raises UserError if a stage is pinned to an artefact that is lost and that its present inputs would not make."""
    if key != stage_key(stage, {name: artifacts[name].key for name in stage.inputs}):
        raise UserError(
            f"{stage.name} is pinned to {key[:12]}, which is lost and was made from other data: restore "
            f"{artifact_path(stage.name, key)}, or lift the pin with unclip unpin to make a new one"
        )


def _pin(store: Store, lineage: str, key: str) -> None:
    """Pins a lineage to the first artefact made, unless another process was first."""
    crash_point("pin.before_swap", pin_path(lineage))
    store.swap(pin_path(lineage), None, json.dumps({"key": key}).encode())


def heal(store: Store, damage: CorruptObject, artifacts: Mapping[str, Artifact], graph: Graph = NO_GRAPH) -> None:
    """Sets aside a damaged blob and every record that names it, so that the next plan makes it again.

    Raises UserError if the object is not ours to make again, or if a pin, a release or a list names it.
    """
    blob = damage.path.rpartition("/")[2]
    if not is_digest(blob) or damage.path != blob_path(blob):
        raise UserError(f"{damage}; it is a file of yours: restore it, or list it again as a new source")
    doomed = [damage.path]
    for artifact in artifacts.values():
        named = blob == artifact.shard_table or blob in artifact.blobs.values()
        if artifact.shard_table is not None and not named:
            try:
                shards = [s for s in read_shards(store, artifact) if blob in s.blobs.values()]
            except CorruptObject as e:  # damaged too: without its list this artefact has to be made again as well
                log.warning("%s; it is set aside too", e)
                doomed.append(e.path)
                named = True
            else:
                doomed += [shard_path(artifact.stage, s.key) for s in shards]
                named = bool(shards)
        if named:
            doomed.append(artifact_path(artifact.stage, artifact.key))
    # What no artefact lists, an earlier pass of its stage has made.
    passes = (f"shards/{stage.name}/" for stage in graph.values() if stage.passes)
    for prefix in (SEGMENTS,) if len(doomed) > 1 else (SEGMENTS, *passes):
        doomed += [entry.path for entry in store.list(prefix) if blob.encode() in store.read(entry.path)]
    set_aside(store, doomed)
    records = sum(not path.startswith("blobs/") for path in doomed)
    log.warning("%s; it is set aside with %d records that name it, and its work done again", damage, records)
