"""The groups of worker pods that a RayJob may have. Pure, and nothing here knows YAML.

Ray's autoscaler decides how many pods of a group there are, by what the running stage asks for; none is there while
nobody asks. Here it is decided which kinds of pods there are, and how many of each there may be at most.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from pipeline.config import Run
from pipeline.errors import UserError
from pipeline.graph.resources import Share, worker_share
from pipeline.settings import EmbeddingsSettings, KubernetesSettings, ShardSettings, TrainingSettings

OBJECT_STORE = 0.3  # of a pod's memory, which is Ray's own share; the rest is for workers


@dataclass(frozen=True)
class Group:
    """At most ``most`` pods with these cores, GiB and GPUs each, whose Ray nodes have ``labels``."""

    name: str
    most: int
    cpus: int
    memory_gb: int
    gpus: int
    labels: Mapping[str, str] = field(default_factory=dict)


def groups(run: Run, stages: Collection[str]) -> list[Group]:
    """Returns the groups of worker pods for these stages; none where the driver does everything.

    Workers join the first group of their kind whose labels do not contradict theirs, so a training, which asks for no
    label, runs on the pods of another stage.

    Raises:
        UserError: A worker fits into no pod, or a training in the driver wants a GPU that its pod lacks.
    """
    settings, found = run.kubernetes, list[Group]()
    for stage, workers, share in demands(run, stages):
        _check_fit(stage, share, settings)
        labels = _labels(share.labels)
        kind, shape = "cpu", (settings.cpus, settings.memory_gb, 0)
        if share.gpus:
            kind, shape = "gpu", (settings.gpu_cpus, settings.gpu_memory_gb, settings.gpus)
        alike = [group for group in found if group.name.startswith(kind)]
        for group in alike:
            if all(group.labels.get(name, value) == value for name, value in labels.items()):
                joined = replace(group, most=group.most + workers, labels={**group.labels, **labels})
                found[found.index(group)] = joined
                break
        else:
            found.append(Group(f"{kind}-{len(alike) + 1}" if alike else kind, workers, *shape, labels))
    return found


def demands(run: Run, stages: Collection[str]) -> Iterator[tuple[str, int, Share]]:
    """Yields stage, number of workers and what each of them takes; nothing of stages that run in the driver.

    Raises:
        UserError: A training in the driver wants a GPU that its pod lacks.
    """
    for stage, settings in vars(run).items():
        if stage not in stages:
            continue
        if isinstance(settings, TrainingSettings):
            if settings.workers:
                yield stage, settings.workers, worker_share(settings, 0.0 if settings.device == "cpu" else 1.0)
            elif settings.device.startswith("cuda") and not run.kubernetes.head_gpus:
                raise UserError(
                    f"run.{stage}.workers: with 0 the driver trains, whose pod has no GPU; "
                    "set it to 1 or more, or run.kubernetes.head_gpus"
                )
        elif isinstance(settings, ShardSettings) and settings.workers:
            yield stage, settings.workers, worker_share(settings, getattr(settings, "gpus", 0.0))
            if isinstance(settings, EmbeddingsSettings) and settings.decoders:
                yield stage, settings.workers * settings.decoders, Share(labels=settings.decoder_nodes)


def _labels(selector: Mapping[str, str]) -> dict[str, str]:
    """Returns labels that satisfy a label selector of Ray's; "!a" is satisfied where the label is missing."""
    values = {name: re.sub(r"^in\(([^,)]*).*\)$", r"\1", value).strip() for name, value in selector.items()}
    return {name: value for name, value in values.items() if not value.startswith("!")}


def _check_fit(stage: str, share: Share, settings: KubernetesSettings) -> None:
    """Raises UserError where a pod lacks what one worker takes: the autoscaler would wait for ever."""
    cpus, memory_gb = ("gpu_cpus", "gpu_memory_gb") if share.gpus else ("cpus", "memory_gb")
    room_mb = int(getattr(settings, memory_gb) * 1024 * (1 - OBJECT_STORE))
    for name, field_name, takes, has in (
        ("gpus", "gpus", share.gpus, settings.gpus),
        ("cpus", cpus, share.cpus, getattr(settings, cpus)),
        ("memory_mb", memory_gb, share.memory >> 20, room_mb),
    ):
        if takes > has:
            raise UserError(
                f"run.{stage}.{name}: {takes:g} a worker are more than the {has} of a pod; "
                f"raise run.kubernetes.{field_name} or lower it"
            )
