"""What the workers of a stage take of a machine. Pure: asks no Ray."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.settings import EmbeddingsSettings, RaySettings, ShardSettings, TrainingSettings

Settings = ShardSettings | TrainingSettings
CGROUP = Path("/sys/fs/cgroup")
SHARED = Path("/dev/shm")  # where Ray's object store lies
STORE_MB, STORE_SHARE = 500, 0.3  # of that store, and of the free memory where there is a GPU
ROOM = 0.8  # of /dev/shm, where NCCL has buffers, too
DECODERS = 12  # at most: a core decodes some 250 images a second, and an H100 embeds 2,500 by CLIP's ViT-B-32
WORKER_BYTES = 2 << 30  # of Python, torch and a CLIP, where the number of workers is "auto"


def cores() -> int:
    """Returns the number of cores that this process may use, of a container's limit the whole ones."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, (CGROUP / "cpu.max").read_text().split())
    except (OSError, ValueError):  # "max", version 1 of cgroups, or not Linux
        return there
    return max(1, min(there, quota // period))


@dataclass(frozen=True)
class Resources:
    """What one process takes of its node, with ``memory`` in bytes, and the labels that the node must have."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def by_name(self) -> dict[str, float]:
        """Returns the amounts by Ray's names, without those that are 0."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return {name: amount for name, amount in amounts.items() if amount}

    def places(self, machine: Mapping[str, float]) -> int:
        """Returns how many such processes a machine with these resources holds."""
        found = []
        for name, amount in self.by_name.items():
            has, taken = machine.get(name, 0.0), amount
            if name == "GPU" and amount < 1:  # Ray puts a share on one GPU: two of 0.4 on each, and one of 0.6
                has, taken = math.floor(has), 1 / math.floor(1 / amount + 1e-9)
            found.append(math.floor(has / taken + 1e-9))  # 0.3 fits three times into 0.9
        return min(found)

    def __str__(self) -> str:
        parts = [amount_of(self.gpus, "GPU")] * (self.gpus > 0) + [amount_of(self.cpus, "core")] * (self.cpus > 0)
        parts += [f"{self.memory >> 20:,} MiB"] * (self.memory > 0)
        labels = ", ".join(f"{name}={value}" for name, value in self.labels.items())
        return " and ".join(parts) + (f" on nodes with {labels}" if labels else "")


@dataclass(frozen=True)
class WorkerGroup:
    """A stage's workers. Each has ``helpers`` helper processes; the stage needs at least ``least`` workers.

    Of helpers that are not ``firm`` it takes those that Ray has room for.
    """

    count: int
    least: int
    worker: Resources
    helpers: int = 0
    helper: Resources = field(default_factory=Resources)
    firm: bool = True

    def room(self, machine: Mapping[str, float]) -> int:
        """Returns how many of the workers, each with its helpers, one machine with these resources holds."""
        whole = replace(self.worker, cpus=self.worker.cpus + self.helpers * self.helper.cpus)
        return min(self.count, whole.places(machine))

    def __str__(self) -> str:
        count = f"at least {self.least}" if 1 < self.least < self.count else f"{self.count}"
        most = "" if self.firm else "up to "
        helpers = f" and {most}{amount_of(self.helpers, 'decoder')} of {self.helper}" if self.helpers else ""
        plural = count != "1"
        return f"{count} worker{'s' * plural} with {self.worker}{helpers}{' each' * plural}"


@dataclass(frozen=True)
class Machine:
    """What there is to run on: this machine, or all nodes of a cluster.

    Attributes:
        cpus: Cores.
        gpus: GPUs.
        gpu: Name of the GPUs; "" if it is not known.
        memory: Memory for workers, bytes.
        local: Machine of this process alone, no cluster.
        grows: Autoscaling: nodes like these are added when they are asked for.
    """

    cpus: float
    gpus: float = 0.0
    gpu: str = ""
    memory: float = 1 << 60
    local: bool = True
    grows: bool = False


def team_of(settings: Settings, machine: Machine, most: int = sys.maxsize) -> WorkerGroup:
    """Returns the workers that these settings ask for; none where this process does the work.

    A stage that goes shard by shard makes do with one worker. So does a training on one machine, unless each worker
    holds its part of the model; on a cluster it has all, or at least ``min_workers``. With device "auto" a training
    takes GPUs where there are enough of them.

    Args:
        settings: Settings of the stage.
        machine: Machine or cluster that they work on.
        most: Largest number of workers that there is work for: the shards, or the rows of a training's batch.
    """
    if isinstance(settings, TrainingSettings):
        return _training_team(settings, machine, most)
    gpus = getattr(settings, "gpus", 0.0)
    if gpus == "auto":
        gpus = 1.0 if machine.gpus >= 1 else 0.0
    share = _worker_share(settings, gpus)
    count = settings.workers if isinstance(settings.workers, int) else _as_many_as_fit(share, machine)
    team = WorkerGroup(min(count, most), 1, share)
    if isinstance(settings, EmbeddingsSettings):
        if settings.decoders == "auto":
            return replace(team, helpers=_decoders(team, machine), firm=False)
        return replace(team, helpers=settings.decoders, helper=Resources(labels=settings.decoder_nodes))
    return team


def _decoders(team: WorkerGroup, machine: Machine) -> int:
    """Returns how many cores are there for each worker with a GPU; 0 where it would be one, as the worker is itself."""
    if not team.worker.gpus or not team.count or machine.gpus < 1:
        return 0
    if machine.grows:  # nodes are added for those that find no core
        return math.ceil(DECODERS * team.worker.gpus)
    each = min(DECODERS, int(machine.cpus / team.count - team.worker.cpus))
    return each if each > 1 else 0


def _as_many_as_fit(share: Resources, machine: Machine) -> int:
    memory = share.memory or (0 if share.gpus else WORKER_BYTES)
    room = {"CPU": machine.cpus, "GPU": machine.gpus, "memory": machine.memory}
    return max(1, replace(share, memory=memory).places(room))


def _training_team(settings: TrainingSettings, machine: Machine, most: int) -> WorkerGroup:
    if isinstance(settings.workers, int):
        count = settings.workers
    else:
        there = int(machine.gpus) if settings.device in ("auto", "cuda") else 0
        count = max(min(there, most), settings.min_workers, int(settings.sharded))
    least = settings.min_workers or count
    if machine.local and not settings.min_workers and not settings.sharded:
        least = min(1, count)
    enough = machine.gpus >= (1 if machine.grows else least)
    on_gpus = settings.device.startswith("cuda") or (settings.device == "auto" and enough)
    threads = min(float(settings.threads), machine.cpus)
    return WorkerGroup(count, least, _worker_share(settings, float(on_gpus), threads))


def _worker_share(settings: Settings, gpus: float, threads: float = 0.0) -> Resources:
    """Returns what one worker with this many ``gpus`` takes under these settings; without, a core for each thread."""
    cpus = settings.cpus or (0.0 if gpus else threads or 1.0)
    return Resources(cpus, gpus, settings.memory_mb << 20, settings.nodes)


def cores_of(settings: RaySettings) -> int:
    """Returns the number of cores that a Ray on this machine may use."""
    return cores() if settings.cpus == "auto" else settings.cpus


def object_store_mb(settings: RaySettings, machine: Machine) -> int:
    """Returns the MiB of the object store of a Ray on this machine."""
    if settings.object_store_mb != "auto":
        return settings.object_store_mb
    if not machine.gpus:
        return STORE_MB
    free = available_memory()
    room = shutil.disk_usage(SHARED).free if SHARED.exists() else free
    return max(STORE_MB, int(min(STORE_SHARE * free, ROOM * room)) >> 20)


def available_memory() -> int:
    """Returns the bytes that new processes may take: of the machine, or of the container if that has less."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):  # not Linux: all there is, used or not
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (limit := container_memory()) is None:
        return free
    try:
        used = int((CGROUP / "memory.current").read_text())
        told = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    return min(free, limit - used + int(told.get("inactive_file", 0)))  # the page cache is given back when it is needed


def container_memory() -> int | None:
    """Returns the bytes that this process's container may take, None without a limit (of version 2 of cgroups)."""
    try:
        return int((CGROUP / "memory.max").read_text())
    except (OSError, ValueError):  # "max", or not Linux
        return None


def amount_of(count: float, what: str) -> str:
    """Returns such as "1 core", "2 cores"."""
    return f"{count:g} {what}{'s' if count != 1 else ''}"
