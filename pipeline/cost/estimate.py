"""Estimates what a stage will cost in time, cores, GPUs and bytes of the store. Runs nothing.

What was observed is scaled by rows, samples and workers (pipeline.cost.observed). Other stages, and all trainings on
GPUs that are asked for, are counted: the arithmetic of their networks over what the machines can do, by the constants
below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.cost.observed import Observation, Observations, pace, shape
from pipeline.errors import UserError
from pipeline.graph.keys import flatten
from pipeline.graph.resources import DECODERS, Machine, Resources, WorkerGroup, cores, team_of
from pipeline.graph.stages import Graph, seconds_to_end
from pipeline.settings import SPARED
from pipeline.training.recipes import ClipRecipe, TrainingRecipe

if TYPE_CHECKING:
    from pipeline.cost.flops import ClipSize, Size

CORE_FLOPS = 50e9  # a second, that networks reach on one core
UTILISATION = 0.3  # of a GPU's bf16 peak
FP32_UTILISATION = 0.5  # of its fp32 peak, which is much lower
MATMUL_SHARE = 0.75  # of the bf16 peak that large matrix products reach: what a measured utilisation is a share of
CLUSTERED_ROWS = 8e6  # up to which near rows are looked for in clusters of one size (docs/near-duplicates.md)
DECODE_SECONDS = 0.004  # of one core, to read a stored image and shrink it to CLIP's view
START_SECONDS = {"data": 6.0, "training": 5.0, "gpus": 60.0}
FETCH_WEIGHTS_SECONDS = 60.0
REFERENCE_BYTES = 300  # of a row in each data stage, besides what it makes
SAVED_BYTES = 1e9  # of a checkpoint that a worker writes in a second
COPIED_BYTES = 20e9  # that a GPU copies in a second, while it does nothing else
SAVED_STATE, MODEL_BYTES = 16, 4  # bytes a parameter: weight, average and two moments of a checkpoint; of an artefact


@dataclass(frozen=True)
class Device:
    """A GPU: operations a second of dense products in bf16, and in fp32 without tensor cores; bytes of memory."""

    peak: float
    fp32: float
    memory: float


# NVIDIA's data sheets and white papers, without sparsity: of A100 to H200 the SXM modules, of B200 a HGX board's figure
# over its eight GPUs, of GeForce bf16 with sums in fp32, at which they are half as fast.
DEVICES = {
    "A100": Device(312e12, 19.5e12, 80e9),
    "H100": Device(989e12, 67e12, 80e9),
    "H200": Device(989e12, 67e12, 141e9),
    "B200": Device(2250e12, 75e12, 180e9),
    "L4": Device(121e12, 30.3e12, 24e9),
    "L40S": Device(362e12, 91.6e12, 48e9),
    "RTX 3060": Device(25.5e12, 12.7e12, 12e9),
    "RTX 3090": Device(71e12, 35.6e12, 24e9),
    "RTX 4090": Device(165e12, 82.6e12, 24e9),
    "RTX 5090": Device(209e12, 104.8e12, 32e9),
}
UNKNOWN = DEVICES["L4"]  # stands for any other GPU
APPLE = re.compile(r"(APPLE|MPS|MAC|M[1-9]\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Fleet:
    """A number of GPUs of one kind."""

    count: int
    name: str


def parse_fleet(text: str) -> Fleet:
    """Reads 64xH100, 1xRTX4090 or "1x RTX 4090" as that many GPUs of that kind. Raises UserError."""
    found = re.fullmatch(r"(\d+)\s*x\s*(\S.*)", text)
    if not found or int(found[1]) < 1:
        raise UserError(f"--gpus {text}: not a number of GPUs; write it as 64xH100")
    if APPLE.match(found[2]):
        raise UserError(f"--gpus {text}: nothing runs on Apple's GPUs; leave it out to plan for this machine's cores")
    wanted = _plain_kind(found[2])
    kind = next((name for name in DEVICES if _plain_kind(name) == wanted), None)
    if kind is None:
        raise UserError(
            f"--gpus {text}: unknown kind {found[2]}; name the known one that is nearest to it: {', '.join(DEVICES)}"
        )
    return Fleet(int(found[1]), kind)


def _plain_kind(name: str) -> str:
    """Returns 4090 for "RTX 4090", "rtx-4090" and "GeForce RTX 4090"; H100 for "NVIDIA H100"."""
    return re.sub(r"NVIDIA|GEFORCE|RTX|\W|_", "", name.upper())


@dataclass(frozen=True)
class PlanInput:
    """What is planned.

    Attributes:
        config: Configuration of the project.
        graph: Stages of the configuration.
        rows: Pairs in the list.
        held_out: Share of them that an evaluation may look at.
        seen: Observations of earlier runs, by stage.
        fleet: GPUs to plan for, in place of the machine's.
        machine: Machine or cluster to run on.
        looked: Machine was inspected, and is not a guess.
        utilisation: Share of a GPU's peak that trainings reach where none was observed.
    """

    config: Config
    graph: Graph
    rows: int
    held_out: float
    seen: Observations = field(default_factory=dict)
    fleet: Fleet | None = None
    utilisation: float = UTILISATION
    machine: Machine = field(default_factory=lambda: Machine(cores()))
    looked: bool = False

    @property
    def gpu(self) -> str:
        """Returns the kind of the GPUs, "" where it is not known."""
        if self.fleet:
            return self.fleet.name
        return next((name for name in DEVICES if re.search(rf"\b{name}\b", self.machine.gpu)), "")

    @property
    def device(self) -> Device:
        """Returns what one of the GPUs can do."""
        return DEVICES.get(self.gpu, UNKNOWN)

    @cached_property
    def recipes(self) -> dict[str, dict[str, Any]]:
        """Returns flattened recipes by stage."""
        return {name: flatten(stage.recipe) for name, stage in self.graph.items()}

    @property
    def shards(self) -> int:
        return -(-self.rows // self.config.source.shard_rows)

    def observations(self, stage: str) -> list[Observation]:
        """Returns those of a stage with the same models."""
        wanted = shape(stage, self.graph, self.recipes)
        return [one for one in self.seen.get(stage, ()) if one.shape == wanted]

    def computes(self, stage: str) -> bool:
        """Says whether a GPU can do a stage's work: networks train, encode or draw."""
        kind = self.graph[stage].kind
        return (kind == "training" and not self.fetches(stage)) or kind == "result" or self.encodes(stage)

    def encodes(self, stage: str) -> bool:
        """Says whether a stage of rows has workers that may take GPUs."""
        return hasattr(getattr(self.config.run, stage, None), "gpus")

    def fetches(self, stage: str) -> bool:
        """Says whether a stage fetches a CLIP instead of training it."""
        recipe = self.graph[stage].recipe
        return isinstance(recipe, TrainingRecipe) and recipe.pretrained


@dataclass(frozen=True)
class Cost:
    """The cost of one stage.

    Attributes:
        seconds: Seconds in all.
        startup: Part of ``seconds`` that does not grow.
        basis: "measured", "counted" from arithmetic, or "guess".
        cores: Cores that it holds for all that time.
        gpus: GPUs that it holds for all that time.
        disk: Bytes that stay in the store.
    """

    seconds: float
    startup: float = 0.0
    basis: str = "guess"
    cores: float = 0.0
    gpus: float = 0.0
    disk: float = 0.0


def estimate(stage: str, ask: PlanInput) -> Cost:
    """Returns what making a stage again costs. Raises UserError for a CLIP that open_clip does not know."""
    workers, held, gpus = resources(stage, ask)
    seen = [] if ask.fleet and gpus else ask.observations(stage)
    if ask.computes(stage) and (gpus or (ask.looked and ask.machine.local)):
        seen = [one for one in seen if (one.device == "cuda") == bool(gpus)]
    if seen:
        startup, seconds = pace([(_amount_seen(stage, one, ask), one) for one in seen], amount(stage, ask), workers)
        gpus, basis = gpus or (workers if seen[-1].device == "cuda" else 0), "measured"
    else:
        startup, rest = _counted(stage, ask, workers, bool(gpus))
        seconds, basis = startup + rest, "counted" if gpus else "guess"
    held = 0 if gpus and ask.graph[stage].kind == "training" else held
    return Cost(seconds, startup, basis, held, gpus, _disk(stage, ask))


def elapsed(costs: Mapping[str, Cost], ask: PlanInput) -> float:
    """Returns the seconds until all these stages are made, in the order of pipeline.graph.execute.

    Trainings whose inputs are there run side by side where there is room, those with the longest way to the end first;
    of all other stages one runs at a time, and nothing begins beside it.
    """
    teams = {stage: _training_team(stage, ask) for stage in costs}
    left = seconds_to_end(ask.graph, {stage: cost.seconds for stage, cost in costs.items()})
    todo = sorted((stage for stage in ask.graph if stage in costs), key=lambda stage: -left[stage])
    now, made, running = 0.0, set[str](), dict[str, float]()
    while todo or running:
        ready = [stage for stage in todo if costs.keys() & set(ask.graph[stage].inputs) <= made]
        alone = [stage for stage in ready if not teams[stage]]
        if all(teams[stage] for stage in running):
            for stage in alone[:1] or ready:
                beside = [team for name in (*running, stage) if (team := teams[name])]
                if alone or not running or _room(beside, ask):
                    todo.remove(stage)
                    running[stage] = now + costs[stage].seconds
        ended = min(running, key=running.__getitem__)
        now = running.pop(ended)
        made.add(ended)
    return now


def _room(teams: Sequence[WorkerGroup], ask: PlanInput) -> bool:
    """Returns whether trainings have room at once."""
    cpus, gpus = (sum(getattr(team.worker, what) * team.count for team in teams) for what in ("cpus", "gpus"))
    there = replace(ask.machine, gpus=ask.fleet.count, grows=False) if ask.fleet else ask.machine
    return there.grows or (cpus <= there.cpus and gpus <= there.gpus)


def _training_team(stage: str, ask: PlanInput) -> WorkerGroup | None:
    """Returns the workers of a training; None for another stage, and where this process trains."""
    if ask.graph[stage].kind != "training" or ask.fetches(stage):
        return None
    lanes = ask.graph[stage].recipe.lanes  # which no workers share
    if ask.fleet:
        count = min(ask.fleet.count, lanes)
        return WorkerGroup(count, count, Resources(0.0, 1.0))
    settings = getattr(ask.config.run, stage)
    team = team_of(settings, ask.machine, lanes)
    if not team.count:
        return None
    if ask.machine.local and not team.worker.gpus and not settings.threads:  # every core
        return replace(team, worker=replace(team.worker, cpus=max(1.0, ask.machine.cpus / team.count)))
    return team


def resources(stage: str, ask: PlanInput) -> tuple[int, float, float]:
    """Returns the workers of a stage, all of their cores, and all of their GPUs."""
    kind, settings, fleet = ask.graph[stage].kind, getattr(ask.config.run, stage, None), ask.fleet
    there = fleet.count if fleet else ask.machine.gpus
    if kind == "training" and not ask.fetches(stage):
        if team := _training_team(stage, ask):
            return team.count, team.count * team.worker.cpus, team.count * team.worker.gpus
        on_gpu = there and ask.machine.local and settings.device != "cpu"  # type: ignore[union-attr]
        return 1, cores(), int(bool(on_gpu))
    if kind == "result":
        return (1, 0, 1) if there else (1, cores(), 0)
    if kind != "data" or settings is None:  # in the driver
        return 1, 1, 0
    if fleet and ask.encodes(stage):
        count = min(fleet.count, max(1, ask.shards))
        each = settings.decoders if settings.decoders not in (0, "auto") else decoders_a_gpu(ask)
        return count, count * each, count
    team = team_of(settings, ask.machine, ask.shards)
    workers = max(1, team.count)
    return workers, workers * ((not team.worker.gpus) + team.helpers), workers * team.worker.gpus


def model_size(config: Config, stage: str) -> Size:
    """Returns the size of the model that a stage trains; to count it imports torch."""
    from pipeline.cost.flops import count_model

    return count_model(config, stage)


def clip_size(recipe: ClipRecipe) -> ClipSize:
    """Returns the size of a CLIP; to count it imports torch."""
    from pipeline.cost.flops import count_clip

    return count_clip(recipe)


def amount(stage: str, ask: PlanInput) -> float:
    """Returns what the time of a stage grows with: samples, operations of networks that draw, or rows."""
    kind = ask.graph[stage].kind
    if kind == "training":
        return 1 if ask.fetches(stage) else ask.graph[stage].recipe.samples
    if kind == "result":
        return _operations(ask.graph[stage].passes_of(ask.recipes, ask.held_out * ask.rows), ask)
    return 0 if kind == "bundle" else _rows_counted(stage, ask.rows, ask)


def _rows_counted(stage: str, rows: float, ask: PlanInput) -> float:
    """Returns rows, each as often as its cluster of near rows is larger than clusters are while their number grows."""
    recipe = ask.graph[stage].recipe
    near = getattr(recipe, "near_duplicate", None) is not None or getattr(recipe, "near_held_out", None) is not None
    return rows * max(1.0, rows / CLUSTERED_ROWS) if near else rows


def _amount_seen(stage: str, one: Observation, ask: PlanInput) -> float:
    return _operations(one.passes, ask) if one.passes else _rows_counted(stage, one.amount, ask)


def _operations(passes: Mapping[str, float], ask: PlanInput) -> float:
    return sum(count * model_size(ask.config, name).forward for name, count in passes.items())


def _counted(stage: str, ask: PlanInput, workers: int, on_gpus: bool) -> tuple[float, float]:
    """Returns seconds that do not grow, and seconds that do."""
    node = ask.graph[stage]
    if ask.fetches(stage):
        return FETCH_WEIGHTS_SECONDS, 0.0
    if node.kind == "training":
        work = node.recipe.samples * model_size(ask.config, stage).training
        if on_gpus:
            seconds = work / (workers * rate(ask, node.recipe.precision, stage))
            size, every = save(stage, ask, workers)
            # The last checkpoint is waited for, the others only copied.
            return START_SECONDS["gpus"] + size / SAVED_BYTES, seconds * (1 + size / COPIED_BYTES / every)
        return START_SECONDS["training"], work / (resources(stage, ask)[1] * CORE_FLOPS)
    if node.kind == "result":
        precision = ask.config.bundle.sampling.precision
        return 0.0, amount(stage, ask) / (rate(ask, precision) if on_gpus else cores() * CORE_FLOPS)
    if on_gpus:
        decoders = resources(stage, ask)[1] or workers  # a worker without helpers decodes on a thread of its own
        each = max(encode_seconds(ask), decode_seconds(ask) * workers / decoders)
        return START_SECONDS["gpus"], ask.rows * each / workers
    each = node.row_seconds
    if any(ask.graph[name].kind == "training" for name in node.inputs):
        each += encode_seconds(ask) + decode_seconds(ask)
    return START_SECONDS["data"] if workers > 1 else 0.0, each * amount(stage, ask) / workers


def rate(ask: PlanInput, precision: str, stage: str = "") -> float:
    """Returns the operations a second of one GPU: as the stage used one, else as is assumed."""
    if precision == "fp32":
        return ask.device.fp32 * FP32_UTILISATION
    seen = ask.observations(stage) if stage else ()
    used = [one.utilisation for one in seen if one.device == "cuda" and one.utilisation]
    return ask.device.peak * (used[-1] * MATMUL_SHARE if used else ask.utilisation)


def save(stage: str, ask: PlanInput, workers: int) -> tuple[float, float]:
    """Returns the bytes that a worker writes of a training's checkpoint, and the seconds between two of them."""
    settings = getattr(ask.config.run, stage)
    size = SAVED_STATE * model_size(ask.config, stage).parameters / (workers if settings.sharded else 1)
    return size, max(settings.checkpoint_every_s, SPARED * size / SAVED_BYTES)


def decode_seconds(ask: PlanInput) -> float:
    """Returns the seconds of one core for one image on its way to CLIP: as observed, else as is assumed."""
    seen = [one for found in ask.seen.values() for one in found if one.decode_seconds]
    return seen[-1].decode_seconds / seen[-1].amount if seen else DECODE_SECONDS


def encode_seconds(ask: PlanInput) -> float:
    """Returns the seconds of one GPU for one pair, or of one core where the embeddings have no GPU."""
    clip, settings = clip_size(ask.config.clip), ask.graph["embeddings"].settings
    on_gpu = ask.fleet or team_of(settings, ask.machine).worker.gpus
    return (clip.image + clip.text) / (rate(ask, ask.config.embeddings.precision) if on_gpu else CORE_FLOPS)


def cores_a_gpu(ask: PlanInput) -> float:
    """Returns how many cores have to decode for one encoder, so that it never waits."""
    return decode_seconds(ask) / encode_seconds(ask)


def decoders_a_gpu(ask: PlanInput) -> int:
    """Returns how many cores ``decoders: auto`` has for one encoder: no more than it needs, or than there are rows."""
    return max(1, min(round(cores_a_gpu(ask)), DECODERS, ask.rows))


def row_bytes(stage: str, ask: PlanInput) -> float:
    """Returns the bytes that are assumed to be stored for a row, besides references."""
    node = ask.graph[stage]
    return node.row_bytes(node.recipe, ask.rows, clip_size(ask.config.clip).dim) if node.row_bytes else 0.0


def _disk(stage: str, ask: PlanInput) -> float:
    """Returns the bytes of a model and the checkpoints that stay, or of a data stage's shards."""
    kind = ask.graph[stage].kind
    if kind == "training":
        kept = 0 if ask.fetches(stage) else getattr(ask.config.run, stage).keep_checkpoints
        return (MODEL_BYTES + kept * SAVED_STATE) * model_size(ask.config, stage).parameters
    if kind not in ("source", "data"):
        return 0.0
    if seen := [one for one in ask.observations(stage) if one.disk]:
        return ask.rows * seen[-1].disk / seen[-1].amount
    return ask.rows * (row_bytes(stage, ask) + REFERENCE_BYTES)
