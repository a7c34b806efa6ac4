"""Run settings: how a stage runs, never what it makes. No field here can move a key.

They stand under ``run:`` in the configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


def _check_gpus(gpus: float) -> float:
    if gpus < 0 or (gpus > 1 and gpus % 1):
        raise ValueError(f"{gpus:g} is neither a share of one GPU nor a whole number of them")
    return gpus


Gpus = Annotated[float, AfterValidator(_check_gpus)]  # as many as Ray gives to one process
PodMemory = Annotated[int, Field(ge=4)]  # GiB


@dataclass(frozen=True)
class ShardSettings:
    """Workers of a shard-wise stage; 0 works in this process, without Ray. ``nodes``: labels, as ``ray start --labels``
    gives them, of the nodes of a cluster where they may run. Ray sets ``cpus`` cores and ``memory_mb`` MiB of a node
    aside for each worker; 0 cpus are one core, or none for a worker with a GPU."""

    workers: NonNegativeInt = 2
    nodes: dict[str, str] = field(default_factory=dict)
    cpus: NonNegativeFloat = 0.0
    memory_mb: NonNegativeInt = 0


@dataclass(frozen=True)
class PairsSettings(ShardSettings):
    """The fetch. ``per_host``: requests at once to one host. ``hosts`` sends a host name to another address; ``allow``
    opens hosts or networks that are not public. ``contact``: a URL or mail address in the user agent. ``headers``: an
    origin to the name of the environment variable that holds headers for it alone."""

    threads: PositiveInt = 16
    per_host: PositiveInt = 4
    timeout_s: PositiveFloat = 20.0
    retries: NonNegativeInt = 2
    hosts: dict[str, str] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    contact: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[!-'*-~]*", self.contact):
            raise ValueError(f"contact: {self.contact!r} is no URL or mail address in ASCII without spaces or brackets")
        for origin, variable in self.headers.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", variable):  # which may be a secret, and is not repeated
                raise ValueError(f"headers: for {origin} give the name of an environment variable, not what it holds")


@dataclass(frozen=True)
class EmbeddingsSettings(ShardSettings):
    """``batch``: rows encoded at once; batches are padded to it. ``decoders``: processes of one core each that decode
    for one worker, on nodes with the labels ``decoder_nodes``; with 0 a worker decodes on a thread beside the
    encoding. ``gpus`` of one worker; with 0 it encodes on its core."""

    batch: PositiveInt = 64
    decoders: NonNegativeInt = 0
    decoder_nodes: dict[str, str] = field(default_factory=dict)
    gpus: Gpus = 0.0


@dataclass(frozen=True)
class GenerationSettings(ShardSettings):
    """``gpus`` of one worker; with 0 it samples on its core."""

    gpus: Gpus = 0.0


@dataclass(frozen=True)
class TrainingSettings:
    """A training. ``workers`` 0 trains in this process; with ``min_workers`` it trains with as many as there is room
    for, at least these and at most ``workers``; ``micro_batch`` 0 takes a worker's share in one piece; ``threads`` 0
    uses every core of the process; ``milestones`` are numbers of samples that become artefacts too. A worker keeps
    ``cache_mb`` MiB of pictures that it has decoded. ``nodes``, ``cpus`` and ``memory_mb`` are those of ShardSettings,
    and a worker takes one GPU or none, as ``device`` says.

    For models that are too large for one device: ``sharded`` spreads weights, averages and moments over the workers,
    ``offload`` keeps them in the memory of the CPU, and ``recompute`` keeps no more than the inputs of layers for the
    backward pass, which costs another forward pass."""

    workers: NonNegativeInt = 0
    min_workers: NonNegativeInt = 0
    micro_batch: NonNegativeInt = 0
    threads: NonNegativeInt = 0
    checkpoint_every_s: NonNegativeFloat = 60.0
    keep_checkpoints: PositiveInt = 2
    milestones: tuple[PositiveInt, ...] = ()
    device: str = "auto"
    cache_mb: NonNegativeInt = 512
    nodes: dict[str, str] = field(default_factory=dict)
    cpus: NonNegativeFloat = 0.0
    memory_mb: NonNegativeInt = 0
    sharded: bool = False
    offload: bool = False
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.nodes and self.min_workers:  # Ray Train would count room on all nodes, and wait for what is not there
            raise ValueError("nodes: labels and min_workers exclude each other; leave min_workers at 0")


@dataclass(frozen=True)
class RaySettings:
    """The local Ray that is started when no cluster is named by RAY_ADDRESS."""

    cpus: PositiveInt = 2
    object_store_mb: Annotated[int, Field(ge=100)] = 500


@dataclass(frozen=True)
class KubernetesSettings:
    """Pods of a RayJob (see cluster.rayjob). ``image`` is theirs, ``service_account`` their right to the bucket,
    ``secret`` the name of a Secret whose entries become environment variables. The driver runs on the head. ``cpus``
    and ``memory_gb`` (GiB) are of a worker pod without GPUs, those with ``gpu_`` of one with ``gpus``; pods with GPUs
    run where Kubernetes' nodes have the labels ``gpu_nodes``. With ``spot`` the workers, never the head, may run on
    nodes that can be taken away. A try ends after ``deadline_hours``."""

    image: str = ""
    namespace: str = "default"
    service_account: str = "default"
    secret: str = ""
    spot: bool = False
    head_cpus: PositiveInt = 4
    head_memory_gb: PodMemory = 16
    head_gpus: NonNegativeInt = 0
    cpus: PositiveInt = 8
    memory_gb: PodMemory = 32
    gpus: PositiveInt = 1
    gpu_cpus: PositiveInt = 8
    gpu_memory_gb: PodMemory = 64
    gpu_nodes: dict[str, str] = field(default_factory=dict)
    deadline_hours: PositiveFloat = 24.0


@dataclass(frozen=True)
class Prices:
    """Prices by which the plan counts, in ``currency``: an hour of one core and of one GPU, a month of 10^12 bytes."""

    currency: str = "USD"
    core_hour: NonNegativeFloat = 0.0
    gpu_hour: NonNegativeFloat = 0.0
    storage_tb_month: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class ReleaseGates:
    """``claims``: whatever held for the release holds for the new bundle. ``figures``: nothing is worse, row by row, by
    more than chance and by more than ``tolerance``, a share of the release's figure. ``ignore``: figures that no gate
    asks about, as "decoder.background"."""

    claims: bool = True
    figures: bool = True
    tolerance: NonNegativeFloat = 0.0
    ignore: tuple[str, ...] = ()
