"""The worker groups of a RayJob: kinds of pods, and how many of each. Pure, and nothing here knows YAML.

Ray's autoscaler decides how many pods of a group run, by what the running stage asks for, down to none. Here the kinds
of pods are decided, and the largest number of each.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.config import Config, Run
from pipeline.errors import UserError
from pipeline.graph.resources import Machine, Resources, team_of
from pipeline.settings import EmbeddingsSettings, KubernetesSettings, ShardSettings, TrainingSettings

# Shares of a pod's memory for Ray's object store; the rest is for workers. Decoded images pass through it on their way
# to the encoders; of all other stages only tasks and results do.
OF_IMAGES, OF_TASKS = 0.3, 0.05
NCCL_MB = 1024  # beside it in /dev/shm for each GPU: NCCL has the buffers between GPUs of a pod there


@dataclass(frozen=True)
class Group:
    """A worker group: at most ``most`` pods with these cores, GiB and GPUs each, whose Ray nodes have ``labels``.

    ``object_store`` is the share of a pod's memory that is Ray's object store.
    """

    name: str
    most: int
    cpus: int
    memory_gb: int
    gpus: int
    labels: Mapping[str, str] = field(default_factory=dict)
    object_store: float = OF_TASKS

    @property
    def store_mb(self) -> int:
        """Returns the MiB of a pod's object store."""
        return int(self.memory_gb * 1024 * self.object_store)

    @property
    def shared_mb(self) -> int:
        """Returns the MiB of a pod's /dev/shm."""
        return self.store_mb + NCCL_MB * max(1, self.gpus)

    def resources(self, more: Mapping[str, str]) -> dict[str, str]:
        """Returns what a pod requests, with ``more`` if it has GPUs."""
        gpus = {"nvidia.com/gpu": str(self.gpus), **more} if self.gpus else {}
        return {"cpu": str(self.cpus), "memory": f"{self.memory_gb}Gi", **gpus}


def head(settings: KubernetesSettings) -> Group:
    """Returns the head, where the driver runs and no worker."""
    return Group("head", 1, settings.head_cpus, settings.head_memory_gb, settings.head_gpus)


def with_fixed_workers(config: Config, stages: Collection[str]) -> Run:
    """Returns the run settings with numbers in place of "auto": as many workers as one pod has cores or GPUs for.

    The cluster comes with the job, so nobody else can say what there will be.
    """
    changed: dict[str, Any] = {}
    for stage, settings in vars(config.run).items():
        if stage in stages and isinstance(settings, TrainingSettings | ShardSettings):
            recipe = getattr(config, stage, None)
            team = team_of(settings, pod(config.run.kubernetes), getattr(recipe, "batch", sys.maxsize))
            taken = getattr(recipe, "pretrained", False)  # by the driver, which copies weights
            numbers: dict[str, Any] = {"workers": 0 if taken else team.count}
            in_driver_on_gpu = not numbers["workers"] and config.run.kubernetes.head_gpus
            if taken or (not team.worker.gpus and not in_driver_on_gpu):
                numbers |= {name: of for name, of in (("gpus", 0.0), ("device", "cpu")) if hasattr(settings, name)}
            changed[stage] = replace(settings, **numbers)
    # A Kueue queue admits all pods at once; without one the autoscaler adds them when a stage needs them.
    ray = replace(config.run.ray, autoscaler=not config.run.kubernetes.queue)
    return replace(config.run, ray=ray, **changed)


def pod(settings: KubernetesSettings) -> Machine:
    """Returns what workers find in one pod with GPUs and one without; more come when they are asked for."""
    memory = (1 - OF_IMAGES) * settings.memory_gb * 2**30
    return Machine(settings.cpus, settings.gpus, memory=memory, local=False, grows=True)


def groups(run: Run, stages: Collection[str]) -> list[Group]:
    """Returns the groups of worker pods for these stages; none where the driver does everything.

    Workers join the first group of their kind that has their label selector, or is free of one. Those that ask for no
    label, as a training does, run on the pods of another stage. A group has room for all of its stages at once.

    Raises:
        UserError: A worker fits into no pod, or a training in the driver wants a GPU that its pod lacks.
    """
    settings, found, homes = run.kubernetes, list[Group](), list[int]()
    selectors: list[Mapping[str, str]] = []  # of each group
    asked = list(demands(run, stages))
    for stage, _, share in asked:
        kind, shape = "cpu", (settings.cpus, settings.memory_gb, 0)
        if share.gpus:
            kind, shape = "gpu", (settings.gpu_cpus, settings.gpu_memory_gb, settings.gpus)
        alike = [i for i, group in enumerate(found) if group.name.startswith(kind)]
        joined = (i for i in alike if not share.labels or not selectors[i] or selectors[i] == share.labels)
        home = next(joined, len(found))
        if home == len(found):
            selectors.append({})
            found.append(Group(f"{kind}-{len(alike) + 1}" if alike else kind, 0, *shape))
        selectors[home] = selectors[home] or share.labels
        group, store = found[home], OF_IMAGES if isinstance(getattr(run, stage), EmbeddingsSettings) else OF_TASKS
        labels = _labels(selectors[home])
        found[home] = replace(group, labels=labels, object_store=max(group.object_store, store))
        homes.append(home)
    for (stage, workers, share), home in zip(asked, homes, strict=True):
        pods = math.ceil(workers / _workers_of_a_pod(stage, share, found[home]))
        found[home] = replace(found[home], most=found[home].most + pods)
    return found


def demands(run: Run, stages: Collection[str]) -> Iterator[tuple[str, int, Resources]]:
    """Yields stage, number of workers and what each of them takes; nothing of stages that run in the driver.

    Raises:
        UserError: A training in the driver wants a GPU that its pod lacks.
    """
    for stage, settings in vars(run).items():
        if stage not in stages:
            continue
        if not isinstance(settings, TrainingSettings | ShardSettings):
            continue
        team = team_of(settings, pod(run.kubernetes))
        if team.count:
            yield stage, team.count, team.worker
            if team.helpers:
                yield stage, team.count * team.helpers, team.helper
        elif getattr(settings, "device", "").startswith("cuda") and not run.kubernetes.head_gpus:
            raise UserError(
                f"run.{stage}.workers: with 0 the driver trains, whose pod has no GPU; "
                "set it to 1 or more, or run.kubernetes.head_gpus"
            )


def _labels(selector: Mapping[str, str]) -> dict[str, str]:
    """Returns labels that satisfy a label selector of Ray's; "!a" is satisfied where the label is missing."""
    values = {name: re.sub(r"^in\(([^,)]*).*\)$", r"\1", value).strip() for name, value in selector.items()}
    return {name: value for name, value in values.items() if not value.startswith("!")}


def _workers_of_a_pod(stage: str, share: Resources, group: Group) -> int:
    """Returns how many workers fit into a pod. Raises UserError for none: the autoscaler would wait for ever."""
    cpus, memory_gb = ("gpu_cpus", "gpu_memory_gb") if share.gpus else ("cpus", "memory_gb")
    room_mb = group.memory_gb * 1024 - group.store_mb
    fitting = math.inf
    for name, field_name, takes, has in (
        ("gpus", "gpus", share.gpus, group.gpus),
        ("cpus", cpus, share.cpus, group.cpus),
        ("memory_mb", memory_gb, share.memory >> 20, room_mb),
    ):
        if takes > has:
            raise UserError(
                f"run.{stage}.{name}: {takes:g} a worker are more than the {has} of a pod; "
                f"raise run.kubernetes.{field_name} or lower it"
            )
        if name == "gpus" and 0 < takes < 1:  # Ray puts a share on one GPU, as Share.places says
            has, takes = math.floor(has), 1 / math.floor(1 / takes + 1e-9)
        if takes:
            fitting = min(fitting, has / takes + 1e-9)  # a share of a GPU is rarely a binary fraction
    return int(fitting)
