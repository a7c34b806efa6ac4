"""Settings: how a stage runs, never what it makes. They stand under ``run:``, and no field of them moves a key."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic_core import CoreSchema, core_schema


def _check_gpus(gpus: float) -> float:
    if gpus < 0 or (gpus > 1 and gpus % 1):
        raise ValueError(f"{gpus:g} is neither a share of one GPU nor a whole number of them")
    return gpus


STATE_BYTES = 20  # a parameter of a training: weight, average, gradient and two moments, in fp32
# Names of variables that hold secrets.
SECRETS = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|(ACCESS|API|PRIVATE|STORAGE|ACCOUNT)_?KEY", re.IGNORECASE)
NO_SECRET = "no secret is written into YAML; put it into a Secret, run.kubernetes.secret"
PUBLIC_KEY = re.compile(r"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI[A-Za-z0-9+/]{43}( .*)?")  # OpenSSH's spelling
COMPILE_PAYS_S = 900.0  # of a training on GPUs, for what compiling takes once: minutes
SPARED = 30  # times as long as it took to write a checkpoint, until the next one


@dataclass(frozen=True)
class OrAuto:
    """Lets a field hold a ``kind`` of number or "auto"; what is neither is refused as the number would be."""

    kind: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            lambda value, read: value if value == "auto" else read(value), handler.generate_schema(self.kind)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"const": "auto"}, handler(schema)]}


Auto = Literal["auto"]
Workers = Annotated[int | Auto, OrAuto(NonNegativeInt)]
Compile = Annotated[bool | Auto, OrAuto(bool)]
Gpus = Annotated[float | Auto, OrAuto(Annotated[float, AfterValidator(_check_gpus)])]  # that Ray gives to one process
PodMemory = Annotated[int, Field(ge=4)]  # GiB


@dataclass(frozen=True)
class ShardSettings:
    """Describes the workers of a shard-wise stage.

    Attributes:
        workers: Processes; 0 works in this process, without Ray. ``auto`` is one per core with at least 2 GiB of memory
            each, or one per GPU for workers with GPUs.
        nodes: Labels of the cluster nodes where workers may run, as set by ``ray start --labels``: ``{pool: cpu}``, or
            ``{pool: "in(cpu,spot)"}``.
        cpus: Cores, or a fraction of one, that Ray reserves for a worker; 0 is one core, or none for a worker with a
            GPU.
        memory_mb: MiB of memory that Ray reserves for a worker, without enforcing it.
    """

    workers: Workers = "auto"
    nodes: dict[str, str] = field(default_factory=dict)
    cpus: NonNegativeFloat = 0.0
    memory_mb: NonNegativeInt = 0


@dataclass(frozen=True)
class PairsSettings(ShardSettings):
    """Describes the fetch.

    Attributes:
        threads: Concurrent downloads of a worker. Most of them wait, for a dead link as long as ``timeout_s``.
        per_host: Concurrent requests from a worker to one host.
        timeout_s: Seconds for a whole image, with redirects, retries and pauses.
        retries: Retries after a timeout, a failed connection, a broken transfer, a 429 or a 5xx status, with
            exponential backoff and jitter.
        hosts: Host name to ``address:port``, such as a mirror; trusted.
        contact: URL or mail address in the user agent, for complaints from server owners.
        headers: Origin, such as ``https://images.example.org``, to the environment variable with headers for it.
    """

    threads: PositiveInt = 256
    per_host: PositiveInt = 4
    timeout_s: PositiveFloat = 20.0
    retries: NonNegativeInt = 2
    hosts: dict[str, str] = field(default_factory=dict)
    contact: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[!-'*-~]*", self.contact):
            raise ValueError(
                f"contact: {self.contact!r} is not a URL or mail address; write ASCII without spaces or brackets"
            )
        for origin, variable in self.headers.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", variable):  # which may be a secret, and is not repeated
                raise ValueError(f"headers: for {origin} give the name of an environment variable, not its value")


@dataclass(frozen=True)
class EmbeddingsSettings(ShardSettings):
    """Describes the encoders.

    Attributes:
        batch: Rows per batch; batches are padded to it.
        decoders: Processes, one core each, that decode images for one worker; 0 decodes on a thread of the worker.
            ``auto`` is 0 without GPUs; a worker with a GPU gets its share of the present cores, up to 12, and 12 if an
            autoscaler adds nodes.
        decoder_nodes: Labels of the nodes where decoders may run, if ``decoders`` is a number.
        gpus: GPUs of a worker, or a fraction of one; 0 encodes on the worker's core. ``auto`` is 1 if Ray has any.
    """

    batch: PositiveInt = 64
    decoders: Workers = "auto"
    decoder_nodes: dict[str, str] = field(default_factory=dict)
    gpus: Gpus = "auto"


@dataclass(frozen=True)
class GenerationSettings(ShardSettings):
    """Describes the workers that sample images of many prompts.

    Attributes:
        gpus: GPUs of a worker, or a fraction of one; 0 samples on its core. ``auto`` is 1 if Ray has any.
    """

    gpus: Gpus = "auto"


@dataclass(frozen=True)
class TrainingSettings:
    """Describes the workers of a training, their memory and their checkpoints.

    Attributes:
        workers: Processes; 0 trains in this one. ``device`` decides whether each takes a GPU. ``auto`` is one per GPU,
            at most one per row of a batch, and 0 without GPUs.
        min_workers: Minimum number of workers of an elastic training, which starts with as many workers as fit, at most
            ``workers``, and continues with more or fewer as machines come and go. 0 keeps the number fixed.
        micro_batch: Rows that a worker computes at once; 0 is its whole share, or on GPUs as many of it as fit in a
            trial before the first step. If memory runs out later, the training resumes from the last checkpoint with
            half as many. CLIP encodes that many at once, and again in the backward pass.
        threads: Threads of a worker; 0 divides all cores among the workers of a machine. A Ray worker without a GPU
            reserves as many cores, so trainings with a number of threads run side by side on one machine. Threads wait
            for each other: on a busy machine, 1 is faster than 2.
        checkpoint_every_s: Minimum seconds between checkpoints, or 30 times the duration of writing one if that is
            longer. 0 saves after every step.
        keep_checkpoints: Number of checkpoints to keep.
        milestones: Numbers of samples at which to publish further artefacts, from one batch up to the start of
            ``decay``.
        device: Device: ``auto``, ``cpu``, ``cuda``, or ``cuda:1``; each Ray worker takes one GPU with ``cuda``, and
            with ``auto`` if there are enough at the start.
        cache_mb: MiB of decoded images that a worker caches; 0 decodes each image every time.
        nodes: Labels of the nodes where Ray workers may run, as for other stages; not with ``min_workers``, for which
            Ray considers all nodes.
        cpus: Cores that Ray reserves for a worker, as for other stages; 0 is one for each of its ``threads``.
        memory_mb: MiB that Ray reserves for a worker, as for other stages.
        sharded: Sharding of weights, averages and moments over the workers (FSDP2), for a model too large for one
            device. If the model fits into half of a node's memory, each node holds one copy. Not for CLIP.
        offload: Offload of the sharded weights, averages and moments to the memory of the CPU; with ``sharded`` only.
        recompute: Activation checkpointing: only each layer's input is kept for the backward pass, at the cost of
            another forward pass.
        compile: Compilation of each layer (torch.compile), which takes minutes before the first step and needs a C
            compiler. ``auto`` compiles on GPUs for trainings of a quarter of an hour or more.
    """

    workers: Workers = "auto"
    min_workers: NonNegativeInt = 0
    micro_batch: NonNegativeInt = 0
    threads: NonNegativeInt = 0
    checkpoint_every_s: NonNegativeFloat = 60.0
    keep_checkpoints: PositiveInt = 2
    milestones: tuple[PositiveInt, ...] = ()
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    cache_mb: NonNegativeInt = 512
    nodes: dict[str, str] = field(default_factory=dict)
    cpus: NonNegativeFloat = 0.0
    memory_mb: NonNegativeInt = 0
    sharded: bool = False
    offload: bool = False
    recompute: bool = False
    compile: Compile = "auto"

    def __post_init__(self) -> None:
        if self.nodes and self.min_workers:  # Ray Train would count room on all nodes, and wait for what is not there
            raise ValueError("nodes: labels and min_workers exclude each other; leave min_workers at 0")


@dataclass(frozen=True)
class RaySettings:
    """Describes the local Ray that is started when `RAY_ADDRESS` names no cluster.

    Attributes:
        cpus: Cores that it may use; ``auto`` is all.
        object_store_mb: MiB of its object store; ``auto`` is 500, or with a GPU, for which it buffers parts of shards,
            30% of the free memory, limited by /dev/shm.
        autoscaler: The cluster at `RAY_ADDRESS` adds nodes on demand. Then nothing is refused at the start, and
            a training on device ``auto`` requests GPUs.
    """

    cpus: Annotated[int | Auto, OrAuto(PositiveInt)] = "auto"
    object_store_mb: Annotated[int | Auto, OrAuto(Annotated[int, Field(ge=100)])] = "auto"
    autoscaler: bool = False


@dataclass(frozen=True)
class KubernetesSettings:
    """Describes the pods of a RayJob. The driver runs on the head.

    Attributes:
        image: Container image of every pod, built from ``cluster/Dockerfile``; a RayJob needs it.
        namespace: Kubernetes namespace of the RayJob.
        service_account: Service account of every pod; it must be able to read and write the bucket, unless ``secret``
            does.
        secret: Name of a Secret whose entries become environment variables of every pod, for a store that needs
            credentials.
        pull_secrets: Names of the Secrets for pulling the image.
        env: Environment variables of every pod, such as ``{NCCL_SOCKET_IFNAME: eth0}``; without secrets.
        labels: Labels of the RayJob and of every pod.
        annotations: Annotations of every pod.
        queue: Name of the Kueue LocalQueue that admits the job. Its pods then start together and stay to the end,
            without Ray's autoscaler.
        spot: Workers prefer spot nodes and tolerate their taints; the head never runs there.
        head_cpus: Cores of the head, where the driver runs and no worker.
        head_memory_gb: Memory of the head, in GiB. A twentieth of every pod's memory is for Ray's object store, three
            tenths with embeddings.
        head_gpus: GPUs of the head, for samples, evaluation and trainings with ``workers: 0``.
        cpus: Cores of a worker pod without GPUs; a worker takes one, or the ``cpus`` of its stage.
        memory_gb: Memory of a worker pod without GPUs, in GiB.
        gpus: GPUs of a GPU worker pod; 0 if no node has any.
        gpu_cpus: Cores of a worker pod with GPUs.
        gpu_memory_gb: Memory of a worker pod with GPUs, in GiB.
        gpu_nodes: Labels of the Kubernetes nodes where pods with GPUs may run, such as ``{nvidia.com/gpu.product:
            NVIDIA-L4}``.
        gpu_resources: Resources that a pod with GPUs requests besides them, such as ``{rdma/hca: "1"}``; its container
            may then lock memory, for RDMA.
        deadline_hours: Hours after which an attempt of the job ends.
    """

    image: str = ""
    namespace: str = "default"
    service_account: str = "default"
    secret: str = ""
    pull_secrets: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    queue: str = ""
    spot: bool = False
    head_cpus: PositiveInt = 4
    head_memory_gb: PodMemory = 16
    head_gpus: NonNegativeInt = 0
    cpus: PositiveInt = 8
    memory_gb: PodMemory = 32
    gpus: NonNegativeInt = 1
    gpu_cpus: PositiveInt = 8
    gpu_memory_gb: PodMemory = 64
    gpu_nodes: dict[str, str] = field(default_factory=dict)
    gpu_resources: dict[str, str] = field(default_factory=dict)
    deadline_hours: PositiveFloat = 24.0

    def __post_init__(self) -> None:
        # Reports and packages hold it, too.
        if secret := next(filter(SECRETS.search, self.env), None):
            raise ValueError(f"env: {secret}: {NO_SECRET}")


@dataclass(frozen=True)
class Prices:
    """Lists the plan's prices.

    Attributes:
        currency: Currency of the prices; only shown.
        core_hour: Price of one core for an hour.
        gpu_hour: Price of one GPU for an hour.
        storage_tb_month: Price of 10^12 bytes in the store for a month.
    """

    currency: str = "USD"
    core_hour: NonNegativeFloat = 0.0
    gpu_hour: NonNegativeFloat = 0.0
    storage_tb_month: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class ReleaseGates:
    """Says which gates a bundle must pass to become the release, and whose signature a release needs.

    Attributes:
        claims: Every claim that held for the release must hold for the new bundle.
        figures: No figure may be significantly worse than the release's, paired by row.
        tolerance: Decline that still passes ``figures``, as a fraction of the release's figure.
        ignore: Figures excluded from the gates, such as ``decoder.background``.
        keys: Public keys (``ssh-ed25519 AAAA...``), one of which must have signed a release before it is used; without
            any, signatures are not checked.
    """

    claims: bool = True
    figures: bool = True
    tolerance: NonNegativeFloat = 0.0
    ignore: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for number, key in enumerate(self.keys, 1):
            if not PUBLIC_KEY.fullmatch(key):  # which may be a private one, and is not repeated
                raise ValueError(
                    f"keys: number {number} is not a public Ed25519 key; write the line of release.key.pub, which "
                    "ssh-keygen -t ed25519 -f release.key makes"
                )
