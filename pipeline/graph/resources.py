"""What the processes of a stage take of a machine, and whether nodes have room for them. Pure: asks no Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.settings import EmbeddingsSettings, GenerationSettings, ShardSettings, TrainingSettings


@dataclass(frozen=True)
class Node:
    """A machine of a cluster: its name and address, and what Ray may use of it. ``memory`` is in bytes."""

    host: str
    cpus: float
    gpus: float
    memory: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """What one process takes of its node, with ``memory`` in bytes, and the labels that the node must have."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)

    def places(self, node: Node) -> int:
        """How many such processes a node can hold."""
        if not has_labels(node, self.labels):
            return 0
        pairs = [(node.cpus, self.cpus), (node.memory, self.memory)]
        if self.gpus >= 1:
            pairs.append((node.gpus, self.gpus))
        fits = [math.floor(has / takes + 1e-9) for has, takes in pairs if takes]  # 0.3 fits three times into 0.9
        if 0 < self.gpus < 1:  # Ray puts a share on one GPU: two of 0.4 on each, and one of 0.6
            fits.append(math.floor(node.gpus) * math.floor(1 / self.gpus + 1e-9))
        return min(fits)


@dataclass(frozen=True)
class Team:
    """The workers of a stage, each with so many ``helpers``; with fewer than ``least`` of them it cannot work."""

    count: int
    least: int
    worker: Share
    helpers: int = 0
    helper: Share = field(default_factory=Share)


Settings = ShardSettings | TrainingSettings


def team_of(settings: Settings, nodes: Sequence[Node], local: bool) -> Team:
    """The workers that these settings ask for, on these nodes.

    A stage that goes shard by shard makes do with one worker. So does a training on the ``local`` Ray of one machine,
    unless each worker holds its part of the model; on a cluster it has all, or at least ``min_workers``.
    """
    if isinstance(settings, ShardSettings):
        gpus = settings.gpus if isinstance(settings, EmbeddingsSettings | GenerationSettings) else 0.0
        team = Team(settings.workers, 1, share_of(settings, gpus))
        if isinstance(settings, EmbeddingsSettings):
            return replace(team, helpers=settings.decoders, helper=Share(labels=settings.decoder_nodes))
        return team
    least = settings.min_workers or settings.workers
    on_gpus = Team(settings.workers, least, share_of(settings, 1.0))
    gpu_asked = settings.device.startswith("cuda")
    gpu_found = settings.device == "auto" and room(on_gpus, nodes) >= least
    team = on_gpus if gpu_asked or gpu_found else replace(on_gpus, worker=share_of(settings, 0.0))
    return replace(team, least=1) if local and not settings.min_workers and not settings.sharded else team


def share_of(settings: Settings, gpus: float) -> Share:
    """What one worker with so many ``gpus`` takes under these settings."""
    cpus = settings.cpus or (0.0 if gpus else 1.0)
    return Share(cpus, gpus, settings.memory_mb << 20, settings.nodes)


def has_labels(node: Node, wanted: Mapping[str, str]) -> bool:
    """Whether a node has these labels. Values are as Ray selects by them: "a", "!a", "in(a,b)" or "!in(a,b)"."""
    for name, value in wanted.items():
        text = value.removeprefix("!")
        values = text[3:-1].split(",") if text.startswith("in(") and text.endswith(")") else [text]
        found = node.labels.get(name) in {one.strip() for one in values}
        if found == value.startswith("!"):
            return False
    return True


def room(team: Team, nodes: Sequence[Node]) -> int:
    """How many workers of a team, each with its helpers, these nodes can hold at once; at most ``team.count``."""
    if not team.helpers:
        return min(team.count, sum(map(team.worker.places, nodes)))
    helpless = sorted(nodes, key=team.helper.places)  # workers go first where helpers cannot
    for count in range(team.count, 0, -1):
        left, rest = count, []
        for node in helpless:
            here = min(left, team.worker.places(node))
            left -= here
            rest.append(replace(node, cpus=node.cpus - here * team.worker.cpus))
        if not left and sum(map(team.helper.places, rest)) >= count * team.helpers:
            return count
    return 0


def lacking(stage: str, team: Team, nodes: Sequence[Node]) -> str:
    """Why a stage can never run on these nodes, such as "embeddings: 2 workers with 1 GPU each, no node has a GPU".

    "" if it can.
    """
    found = room(team, nodes)
    if found >= team.least:
        return ""
    count = f"at least {team.least}" if 1 < team.least < team.count else f"{team.count}"
    helpers = f" and {_number(team.helpers, 'decoder')} of 1 core" if team.helpers else ""
    workers = f"{count} worker{'s' if count != '1' else ''} with {_said(team.worker)}{helpers}"
    why = _why(team.worker, nodes) or (team.helpers and _why(team.helper, nodes, "for decoders "))
    room_for = f"there is room for {found or 'none'}" + (" at once" if found else "")
    return f"{stage}: {workers}{' each' if count != '1' else ''}, {why or room_for}"


def _number(count: float, what: str) -> str:
    return f"{count:g} {what}{'s' if count != 1 else ''}"


def _said(share: Share) -> str:
    """'1 GPU', '2 cores and 4,096 MiB'."""
    parts = [_number(share.gpus, "GPU")] * (share.gpus > 0) + [_number(share.cpus, "core")] * (share.cpus > 0)
    return " and ".join([*parts, *([f"{share.memory >> 20:,} MiB"] if share.memory else [])])


def _why(share: Share, nodes: Sequence[Node], whose: str = "") -> str:
    """What no node has of what one process takes; "" if one has all of it."""
    if any(share.places(node) for node in nodes):
        return ""
    found = [node for node in nodes if has_labels(node, share.labels)]
    labels = ", ".join(f"{name}={value}" for name, value in share.labels.items())
    if not found:
        return f"no node {whose}has the label{'s' if len(share.labels) > 1 else ''} {labels}"
    no_node = f"no node {whose}{f'with {labels} ' if labels else ''}has"
    if share.gpus > (gpus := max(node.gpus for node in found)):
        return f"{no_node} more than {_number(gpus, 'GPU')}" if gpus else f"{no_node} a GPU"
    if share.cpus > (cpus := max(node.cpus for node in found)):
        return f"{no_node} more than {_number(cpus, 'core')}" if cpus else f"{no_node} a core"
    if share.memory > (memory := max(node.memory for node in found)):
        return f"{no_node} more than {int(memory) >> 20:,} MiB for Ray's workers"
    return f"{no_node} all of that"
