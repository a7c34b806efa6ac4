"""What the workers of a stage take of a machine. Pure: asks no Ray."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pipeline.settings import EmbeddingsSettings, GenerationSettings, ShardSettings, TrainingSettings

Settings = ShardSettings | TrainingSettings


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Share:
    """What one process takes of its node, with ``memory`` in bytes, and the labels that the node must have."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def resources(self) -> dict[str, float]:
        """Returns the amounts by Ray's names, without those that are 0."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return {name: amount for name, amount in amounts.items() if amount}

    def places(self, machine: Mapping[str, float]) -> int:
        """Returns how many such processes a machine with these resources holds."""
        found = []
        for name, amount in self.resources.items():
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
class Team:
    """A stage's workers. Each has ``helpers`` helper processes; the stage needs at least ``least`` workers."""

    count: int
    least: int
    worker: Share
    helpers: int = 0
    helper: Share = field(default_factory=Share)

    def room(self, machine: Mapping[str, float]) -> int:
        """Returns how many of the workers, each with its helpers, one machine with these resources holds."""
        whole = replace(self.worker, cpus=self.worker.cpus + self.helpers * self.helper.cpus)
        return min(self.count, whole.places(machine))

    def __str__(self) -> str:
        count = f"at least {self.least}" if 1 < self.least < self.count else f"{self.count}"
        helpers = f" and {amount_of(self.helpers, 'decoder')} of {self.helper}" if self.helpers else ""
        plural = count != "1"
        return f"{count} worker{'s' * plural} with {self.worker}{helpers}{' each' * plural}"


def team_of(settings: Settings, gpus: float, local: bool, autoscaler: bool = False) -> Team:
    """Returns the workers that these settings ask for.

    A stage that goes shard by shard makes do with one worker. So does a training on the Ray of one machine, unless each
    worker holds its part of the model; on a cluster it has all, or at least ``min_workers``. With device "auto" a
    training takes GPUs where there are enough of them.

    Args:
        settings: Those of the stage.
        gpus: How many GPUs Ray has.
        local: Whether it is the Ray of this machine.
        autoscaler: Whether more GPUs come when they are asked for.
    """
    if isinstance(settings, ShardSettings):
        share = worker_share(
            settings, settings.gpus if isinstance(settings, EmbeddingsSettings | GenerationSettings) else 0.0
        )
        team = Team(settings.workers, 1, share)
        if isinstance(settings, EmbeddingsSettings):
            return replace(team, helpers=settings.decoders, helper=Share(labels=settings.decoder_nodes))
        return team
    least = settings.min_workers or settings.workers
    if local and not settings.min_workers and not settings.sharded:
        least = 1
    found = settings.device == "auto" and (autoscaler or gpus >= least)
    share = worker_share(settings, 1.0 if found or settings.device.startswith("cuda") else 0.0)
    return Team(settings.workers, least, share)


def worker_share(settings: Settings, gpus: float) -> Share:
    """Returns what one worker with this many ``gpus`` takes under these settings."""
    cpus = settings.cpus or (0.0 if gpus else 1.0)
    return Share(cpus, gpus, settings.memory_mb << 20, settings.nodes)


def amount_of(count: float, what: str) -> str:
    """Returns such as "1 core", "2 cores"."""
    return f"{count:g} {what}{'s' if count != 1 else ''}"
