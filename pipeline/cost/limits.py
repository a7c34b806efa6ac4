"""Says in one line what a machine lacks for what is planned: a GPU, its memory, or room on a disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.cost.devices import DEVICES, Fleet
from pipeline.cost.estimate import (
    Cost,
    PlanInput,
    model_size,
    resources,
    step_of,
    worker_memory,
)
from pipeline.cost.memory import SAVED_STATE, USABLE, settings_that_fit
from pipeline.cost.table import counted_trainings, devices_of, size
from pipeline.data.pairs.stage import shards_at_once
from pipeline.progress import counted, duration
from pipeline.store import Store, local_folder

LONGEST_S = 86_400.0  # that a CPU may take for what a GPU does in minutes, unless the user wants it


@dataclass(frozen=True)
class Lack:
    """What a machine lacks for a plan, and what to do about it."""

    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


def lacking(costs: Mapping[str, Cost], ask: PlanInput, store: Store) -> Iterator[Lack]:
    """Yields what is lacking for stages that will be made.

    Room on a disk, memory of a GPU or of its host, a GPU where a CPU would take over a day.
    """
    yield from _disks(costs, ask, store)
    yield from impossible(costs, ask)


def impossible(costs: Mapping[str, Cost], ask: PlanInput) -> Iterator[Lack]:
    """Yields what no store changes: memory of a GPU, a GPU where a CPU would take over a day."""
    yield from too_large(costs, ask)
    yield from _hosts(costs, ask)
    if slow := [s for s, cost in costs.items() if ask.computes(s) and not cost.gpus and cost.seconds > LONGEST_S]:
        longest = max(slow, key=lambda stage: costs[stage].seconds)
        takes = f"{devices_of(costs[longest], ask)} would take about {duration(costs[longest].seconds)} for {longest}"
        yield Lack(
            f"{', '.join(slow)} need{'s' if len(slow) == 1 else ''} a GPU: {takes}",
            "run it where there is one, or take preset=tiny, or scale=0.1",
        )


def too_large(costs: Mapping[str, Cost], ask: PlanInput) -> Iterator[Lack]:
    """Yields each training of which one pass, with what it holds, does not fit into a GPU of a known kind."""
    for stage, gpus in counted_trainings(costs, ask).items() if ask.gpu else ():
        if (step := step_of(stage, ask, gpus)).fits:
            continue
        yield Lack(
            f"{stage} takes {size(step.memory)} of a GPU for {counted(step.at_once, 'row')} at once, and one {ask.gpu} "
            f"has {size(ask.device.memory)}, {size(USABLE * ask.device.memory)} beside CUDA's own",
            _what_fits(stage, ask, gpus),
        )


def _what_fits(stage: str, ask: PlanInput, gpus: int) -> str:
    """Returns what to do about a training that does not fit: settings, or else the smallest GPUs that have room."""
    settings, recipe = getattr(ask.config.run, stage), ask.graph[stage].recipe
    if found := settings_that_fit(stage, model_size(ask.config, stage), recipe, settings, gpus, ask.device.memory):
        return f"set {found}"
    for kind in sorted(DEVICES, key=lambda name: DEVICES[name].memory):
        if step_of(stage, replace(ask, fleet=Fleet(gpus, kind)), gpus).fits:
            return f"take {gpus} {kind}, or a smaller preset"
    return "take more GPUs, with sharded=true, or a smaller preset"


def _hosts(costs: Mapping[str, Cost], ask: PlanInput) -> Iterator[Lack]:
    """Yields each training whose workers take more memory of their machines than there is."""
    if ask.fleet or ask.machine.grows:  # of machines that nobody has seen
        return
    there = ask.machine.memory
    for stage, gpus in counted_trainings(costs, ask).items():
        if (need := gpus * worker_memory(stage, ask, gpus)) <= there:
            continue
        own = getattr(ask.config.run, stage)
        bare = replace(ask.config.run, **{stage: replace(own, cache_mb=0)})
        less = replace(ask, config=replace(ask.config, run=bare))
        fewer = next((n for n in range(gpus - 1, 0, -1) if n * worker_memory(stage, ask, n) <= there), 0)
        advice = "take machines with more memory, or a smaller model"
        if gpus * worker_memory(stage, less, gpus) <= there:
            advice = f"set run.{stage}.cache_mb=0"
        elif fewer:
            advice = f"set run.{stage}.workers={fewer}"
        yield Lack(
            f"{stage} takes {size(need)} of memory for {counted(gpus, 'worker')}, and the machines have {size(there)}",
            advice,
        )


def _disks(costs: Mapping[str, Cost], ask: PlanInput, store: Store) -> Iterator[Lack]:
    """Yields each disk of this machine that is too small for the store, or for temporary files; S3 has always room."""
    if ask.fleet:  # of other machines
        return
    needs: list[tuple[Path, str, float]] = []
    if ask.machine.local:
        scratch = max((_scratch(stage, cost, ask) for stage, cost in costs.items()), default=0.0)
        needs.append((Path(tempfile.gettempdir()), "temporary files (TMPDIR)", scratch))
    if folder := local_folder(store):
        needs.append((folder, f"the store {store.url}", sum(cost.disk for cost in costs.values())))
    disks: dict[int, list[tuple[Path, str, float]]] = {}
    for where, what, need in needs:
        there = next(path for path in (where, *where.absolute().parents) if path.exists())
        disks.setdefault(there.stat().st_dev, []).append((there, what, need))
    for uses in disks.values():
        need, disk = sum(use[2] for use in uses), shutil.disk_usage(uses[0][0])
        free, what = disk.free, " and ".join(use[1] for use in uses)
        if not disk.total:  # such as /proc
            yield Lack(f"{what}: files cannot be stored there", "name another place")
        elif need > free:
            room = f"about {size(need)} will be needed, and {size(free)} are free"
            yield Lack(f"the disk of {what} is too small: {room}", "free space, or name another place")


def _scratch(stage: str, cost: Cost, ask: PlanInput) -> float:
    """Returns the bytes of a stage's temporary files: the shards that workers make, or a training's checkpoint."""
    if ask.graph[stage].kind == "data":
        shards, held, copies = max(1, ask.shards), 1, 1
        if stage == "pairs":  # of a shard that is being uploaded the images lie there twice: in a spool and in the tar
            held, copies = shards_at_once(ask.rows / shards) if ask.config.run.pairs.workers else 1, 2
        return cost.disk * copies * min(1.0, held * resources(stage, ask)[0] / shards)
    if ask.graph[stage].kind == "training" and not ask.fetches(stage):
        return SAVED_STATE * model_size(ask.config, stage).parameters
    return 0.0
