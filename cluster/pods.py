"""How many worker pods of which kind the stages of a job need. Pure, and nothing here knows YAML.

Sizes are known before anything runs: a stage asks for as many cores or GPUs as its settings name workers. Stages run
one after another, so a group of pods has what the one that asks for most asks for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from pipeline.config import Run
from pipeline.errors import UserError
from pipeline.graph.resources import Node, Share, share_of
from pipeline.settings import EmbeddingsSettings, KubernetesSettings, ShardSettings, TrainingSettings

OBJECT_STORE = 0.3  # of a pod's memory, which is Ray's own share; the rest is for workers


@dataclass(frozen=True)
class Demand:
    """What one stage asks for: ``workers`` that take so many ``cpus``, ``gpus`` and MiB each, on Ray nodes with
    ``labels``."""

    stage: str
    workers: int
    cpus: float = 1.0
    gpus: float = 0.0
    memory_mb: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """So many ``pods`` with these cores, GiB and GPUs each, whose Ray nodes have ``labels``."""

    name: str
    pods: int
    cpus: int
    memory_gb: int
    gpus: int
    labels: Mapping[str, str]


def groups(run: Run, stages: Collection[str]) -> list[Group]:
    """The groups of worker pods for these stages; none where the driver does everything.

    Raises UserError for a worker that fits into no pod, and for a training in the driver on a GPU that is not there.
    """
    settings, found = run.kubernetes, list[Group]()
    for members in _joined(demands(run, stages)):
        kind = "gpu" if members[0].gpus else "cpu"
        earlier = sum(group.name.startswith(kind) for group in found)
        shape = (settings.cpus, settings.memory_gb, 0)
        if kind == "gpu":
            shape = (settings.gpu_cpus, settings.gpu_memory_gb, settings.gpus)
        labels = {name: value for demand in members for name, value in demand.labels.items()}
        found.append(Group(f"{kind}-{earlier + 1}" if earlier else kind, _pods(members, settings), *shape, labels))
    return found


def demands(run: Run, stages: Collection[str]) -> Iterator[Demand]:
    """What these stages ask of worker pods; nothing where the driver works itself. Raises UserError as ``groups``."""
    for stage, settings in vars(run).items():
        if stage not in stages:
            continue
        if isinstance(settings, TrainingSettings):
            if settings.workers:
                yield _demand(stage, settings, 0.0 if settings.device == "cpu" else 1.0)
            elif settings.device.startswith("cuda") and not run.kubernetes.head_gpus:
                raise UserError(
                    f"run.{stage}.workers: with 0 the driver trains, whose pod has no GPU; "
                    "set it to 1 or more, or run.kubernetes.head_gpus"
                )
        elif isinstance(settings, ShardSettings) and settings.workers:
            yield _demand(stage, settings, getattr(settings, "gpus", 0.0))
            if isinstance(settings, EmbeddingsSettings) and settings.decoders:
                yield Demand(stage, settings.workers * settings.decoders, labels=_labels(settings.decoder_nodes))


def _demand(stage: str, settings: ShardSettings | TrainingSettings, gpus: float) -> Demand:
    share = share_of(settings, gpus)
    return Demand(stage, settings.workers, share.cpus, gpus, settings.memory_mb, _labels(settings.nodes))


def _labels(selector: Mapping[str, str]) -> dict[str, str]:
    """Labels that satisfy a label selector of Ray's. One with "!" is satisfied where there is no such label."""
    values = {name: re.sub(r"^in\(([^,)]*).*\)$", r"\1", value).strip() for name, value in selector.items()}
    return {name: value for name, value in values.items() if not value.startswith("!")}


def _joined(asked: Iterable[Demand]) -> list[list[Demand]]:
    """Demands by the group that takes them. One joins the first of its kind whose labels do not contradict its own, so
    that a training, which asks for no label, finds room on the pods of another stage."""
    found: list[list[Demand]] = []
    for demand in asked:
        group = next((members for members in found if all(_agree(demand, other) for other in members)), None)
        if group is None:
            found.append([demand])
        else:
            group.append(demand)
    return found


def _agree(a: Demand, b: Demand) -> bool:
    same_kind = (a.gpus > 0) == (b.gpus > 0)
    return same_kind and all(b.labels.get(name, value) == value for name, value in a.labels.items())


def _pods(members: Sequence[Demand], settings: KubernetesSettings) -> int:
    """The pods of a group: what the stage that asks for most asks for, all its demands at once."""
    by_stage = dict.fromkeys((demand.stage for demand in members), Fraction())
    for demand in members:
        by_stage[demand.stage] += Fraction(demand.workers, _workers_in_a_pod(demand, settings))
    return math.ceil(max(by_stage.values()))


def _workers_in_a_pod(demand: Demand, settings: KubernetesSettings) -> int:
    """Raises UserError where not one fits."""
    shape = (settings.cpus, settings.memory_gb, "cpus", "memory_gb")
    if demand.gpus:
        shape = (settings.gpu_cpus, settings.gpu_memory_gb, "gpu_cpus", "gpu_memory_gb")
    room_mb = int(shape[1] * 1024 * (1 - OBJECT_STORE))
    for name, field_name, takes, has in (
        ("gpus", "gpus", demand.gpus, settings.gpus),
        ("cpus", shape[2], demand.cpus, shape[0]),
        ("memory_mb", shape[3], demand.memory_mb, room_mb),
    ):
        if takes > has:
            raise UserError(
                f"run.{demand.stage}.{name}: {takes:g} a worker are more than the {has} of a pod; "
                f"raise run.kubernetes.{field_name} or lower it"
            )
    pod = Node("a pod", shape[0], settings.gpus, room_mb << 20)
    return Share(demand.cpus, demand.gpus, demand.memory_mb << 20).places(pod)
