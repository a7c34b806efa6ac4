"""Runs stale stages, trainings side by side where Ray has room."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from queue import Empty, Queue
from threading import Lock, Thread
from typing import Any

from pipeline.errors import Superseded, UserError
from pipeline.graph.artifacts import Artifact, artifact_path, load_artifact
from pipeline.graph.leases import Lease, lead_or_wait
from pipeline.graph.plan import Verdict, pin_path
from pipeline.graph.ray import room_beside, start_ray, uses_ray
from pipeline.graph.stages import Context, Graph, Stage, ordered, seconds_to_end, stage_key, trajectory_key, trunk_key
from pipeline.progress import above_lines, under_way
from pipeline.store import Store
from pipeline.store.crash import crash_point

log = logging.getLogger("unclip")
LOOK_S = 30.0  # between two looks for free resources beside the running trainings
OnStage = Callable[[str, Artifact], None]
OnLook = Callable[[Sequence[Artifact], Mapping[str, Artifact]], None]


def execute(
    graph: Graph,
    verdicts: Sequence[Verdict],
    wanted: set[str],
    store: Store,
    config: Any,
    seconds: Mapping[str, float],
    on_stage: OnStage,
    on_look: OnLook,
) -> dict[str, Artifact]:
    """Makes the ``wanted`` stages and everything that they need, where they are stale, and returns their artefacts.

    One stage runs after another, but independent trainings run at once where Ray has room for all their workers. Of
    those that could begin, the one on the longest remaining path is first. A training that fails does not stop the
    others: stages that do not need it are still made, and then its error is raised.

    Args:
        graph: Stages of the project, all of them.
        verdicts: The plan.
        wanted: Names of stages, with all that they need.
        store: Store of the artefacts.
        config: The whole Config.
        seconds: Estimated time of stages, by name; where there is none, the order of the graph decides.
        on_stage: Called after each stage that was made.
        on_look: Called after that, and from other threads while trainings run, with their preliminary artefacts (see
            pipeline.training.follow) and with all artefacts so far.

    Raises:
        CorruptObject: A stored object is damaged.
    """
    run = _Run({verdict.stage: verdict for verdict in verdicts}, store, config, on_stage, on_look)
    left = seconds_to_end(graph, seconds)
    run.make(sorted((stage for stage in ordered(graph) if stage.name in wanted), key=lambda stage: -left[stage.name]))
    if run.failures:
        raise run.failures[0]
    return {name: run.artifacts[name] for name in graph if name in run.artifacts}


class _Run:
    """Makes stages. ``artifacts`` are the finished ones by stage; ``failures`` holds errors."""

    def __init__(self, verdicts: Mapping[str, Verdict], store: Store, config: Any, on_stage: OnStage, on_look: OnLook):
        self.artifacts: dict[str, Artifact] = {}
        self.failures: list[BaseException] = []
        self._verdicts, self._store, self._config = verdicts, store, config
        self._on_stage, self._on_look = on_stage, on_look
        self._beside: dict[str, Stage] = {}  # trainings in threads
        self._ended: Queue[tuple[Stage, Artifact | BaseException]] = Queue()
        self._shown: dict[str, Artifact] = {}  # preliminary artefacts of the running trainings
        self._lock = Lock()

    def make(self, stages: Sequence[Stage]) -> None:
        """Makes stages, in the given order where it is free, until all are made or those left need one that failed."""
        todo, stale, together = list(stages), list[Stage](), False  # together: whether trainings ran side by side
        while True:
            for stage in list(todo):
                if set(stage.inputs) <= self.artifacts.keys():
                    todo.remove(stage)
                    found = self._found(stage)
                    if isinstance(found, Artifact):
                        self._keep(stage, found)
                    elif found is not None:
                        self._end(stage, found)
                    else:
                        stale.append(stage)
            # A failure ends the run once nothing runs beside it. Where trainings ran side by side, those that could
            # begin are still made: had they begun first, they would have been.
            if self.failures and not self._beside and not (together and any(map(self._on_ray, stale))):
                return
            begun = self._next(sorted(stale, key=stages.index))
            stale = [stage for stage in stale if stage not in begun]
            # In this thread, so that Ctrl-C reaches the stage itself. Ray Train has a thread of its own: in this one
            # it would take Ctrl-C for itself, and end the process without a word.
            if begun and not self._on_ray(begun[0]):
                self._end(begun[0], self._made(begun[0]))
                continue
            together |= len(begun) + len(self._beside) > 1
            if begun:
                # Not in theirs: only the main thread can keep Ray's handler of SIGTERM out.
                start_ray(self._config.run.ray)
            for stage in begun:
                self._beside[stage.name] = stage
                Thread(target=self._work_beside, args=(stage,), daemon=True, name=stage.name).start()
            if not self._beside:
                return
            try:
                stage, made_or_failed = self._ended.get(timeout=LOOK_S)
            except Empty:  # other resources may have become free meanwhile
                continue
            del self._beside[stage.name]
            self._end(stage, made_or_failed)

    def _found(self, stage: Stage) -> Artifact | Exception | None:
        """Returns a stage's artefact, the error of its check, or None for a stage that has to be made."""
        # The check runs as soon as the inputs are there, before hours go into other stages.
        key = self._verdicts[stage.name].key
        try:
            if made := load_artifact(self._store, stage.name, key):
                return made
            if stage.check is not None:
                stage.check(make_context(stage, key, self.artifacts, self._store, self._config))
        except Exception as e:
            return e
        return None

    def _next(self, stale: Sequence[Stage]) -> Sequence[Stage]:
        """Returns which of some stages, all of whose inputs are there, begin now: one, or trainings at once."""
        if not stale:
            return []
        here = [stage for stage in stale if not self._on_ray(stage)]  # which run one at a time
        if here or len(stale) + len(self._beside) <= 1:
            return here[:1] or stale
        asking, running = (
            {stage.name: (stage.settings, stage.recipe.batch) for stage in stages}
            for stages in (stale, self._beside.values())
        )
        room = room_beside(asking, running, self._config.run.ray)
        return [stage for stage in stale if stage.name in room] or ([] if self._beside else stale[:1])

    def _on_ray(self, stage: Stage) -> bool:
        return stage.kind == "training" and uses_ray(stage.settings, self._config.run.ray)

    def _work_beside(self, stage: Stage) -> None:
        found: Artifact | BaseException
        try:
            found = self._made(stage)
        except BaseException as e:  # also SystemExit, which would end this thread silently, and ``make`` would wait on
            found = e
        self._ended.put((stage, found))

    def _made(self, stage: Stage) -> Artifact | BaseException:
        """Returns the artefact of a stage, which it makes, or what went wrong."""
        verdict, artifacts = self._verdicts[stage.name], dict(self.artifacts)
        try:
            if verdict.lineage is not None:
                _check_pin(stage, verdict.key, artifacts)
            return _run_stage(stage, verdict.key, artifacts, self._store, self._config, self._look)
        except Exception as e:
            return e

    def _end(self, stage: Stage, found: Artifact | BaseException) -> None:
        """Keeps and reports a stage's artefact, or its error, which is logged where other stages go on."""
        with self._lock:
            self._shown.pop(stage.name, None)
        try:
            if isinstance(found, BaseException):
                raise found
            self._keep(stage, found)
            with above_lines():
                self._on_stage(stage.name, found)
            self._look()
        except Exception as e:
            self.failures.append(e)
            if self._beside:
                log.warning("%s failed: %s; still running: %s", stage.name, e, ", ".join(sorted(self._beside)))

    def _keep(self, stage: Stage, made: Artifact) -> None:
        self.artifacts[stage.name] = made
        if (lineage := self._verdicts[stage.name].lineage) is not None:
            _pin(self._store, lineage, made.key)

    def _look(self, running: Artifact | None = None) -> None:
        with self._lock:
            if running is not None:
                self._shown[running.stage] = running
            self._on_look(list(self._shown.values()), dict(self.artifacts))


def make_context(stage: Stage, key: str, artifacts: Mapping[str, Artifact], store: Store, config: Any) -> Context:
    """Returns the context of a stage. ``artifacts`` hold its inputs."""
    inputs = {stage.roles.get(name, name): artifacts[name] for name in stage.inputs}
    run = config.run
    given = (config.project, run.ray, run.output, run.trackers, stage.given)
    return Context(store, stage.name, stage.version, key, stage.recipe, stage.settings, inputs, *given)


def _run_stage(
    stage: Stage,
    key: str,
    artifacts: Mapping[str, Artifact],
    store: Store,
    config: Any,
    show: Callable[[Artifact], None],
) -> Artifact:
    ctx = make_context(stage, key, artifacts, store, config)

    def finished() -> bool:
        return store.stat(artifact_path(stage.name, key)) is not None

    def newest() -> str:
        if stage.kind != "training":
            return ""
        folders = [f"checkpoints/{key}/" for key in (trunk_key(ctx), trajectory_key(ctx))]
        saved = [[e.path for e in store.list(f) if e.path.count("/") == f.count("/")] for f in folders]
        return str([max(paths, default="") for paths in saved])  # without attempts, which lie below

    def lead(key: str) -> Lease | None:
        progress = partial(under_way, stage.name)
        return lead_or_wait(store, key, config.run.lease_s, finished, newest, stage=stage.name, progress=progress)

    def run() -> Artifact | None:
        # Trainings that differ in their length alone share checkpoints: one leads, and the others go on from its last.
        trunk = lead(f"checkpoints/{trunk_key(ctx)}") if stage.kind == "training" else nullcontext()
        if trunk is None:
            return None
        with trunk:  # ``began`` is now, without the time that it waited for a lease
            return stage.run(replace(ctx, began=time.time(), show=show))

    # A lease saves double work and proves nothing: whether the record is there decides, so it is read under the lease
    # again, and after another process has led.
    while True:
        lease = lead(key)
        if lease is not None:
            with lease:
                try:
                    if made := load_artifact(store, stage.name, key) or run():
                        return made
                except Superseded:
                    log.warning("%s: another run has taken over; waiting for its result", stage.name)
        made = load_artifact(store, stage.name, key)
        if made is not None:
            return made


def _check_pin(stage: Stage, key: str, artifacts: Mapping[str, Artifact]) -> None:
    """Raises UserError if a stage is pinned to an artefact that is lost and that its present inputs would not make."""
    if key != stage_key(stage, {name: artifacts[name].key for name in stage.inputs}):
        raise UserError(
            f"{stage.name} is pinned to {key[:12]}, which is missing and was made from other data: restore "
            f"{artifact_path(stage.name, key)}, or lift the pin with unclip unpin to make a new one"
        )


def _pin(store: Store, lineage: str, key: str) -> None:
    """Pins a lineage to the first artefact made, unless another process was first."""
    crash_point("pin.before_swap", pin_path(lineage))
    store.swap(pin_path(lineage), None, json.dumps({"key": key}).encode())
