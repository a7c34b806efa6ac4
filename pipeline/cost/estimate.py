"""Estimates what a stage will cost in time, cores, GPUs and bytes of the store. Runs nothing.

What was observed is scaled by rows, samples and workers (pipeline.cost.observed). Other stages, and all trainings on
GPUs that are asked for, are counted: operations of their networks over what machines can do, by the constants below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.cost.devices import DEVICES, UNKNOWN, Device, Fleet
from pipeline.cost.memory import SAVED_STATE, Footprint, footprint, host_memory, state_parts
from pipeline.cost.observed import Observation, Observations, paces, shape
from pipeline.data.embeddings.stage import TASK_BYTES
from pipeline.data.source.passes import TASK_BYTES as LIST_TASK_BYTES
from pipeline.graph.keys import flatten
from pipeline.graph.resources import DECODERS, Machine, Resources, WorkerGroup, cores, team_of
from pipeline.graph.stages import Graph
from pipeline.settings import COMPILE_PAYS_S, SPARED
from pipeline.training.recipes import ClipRecipe, TrainingRecipe

if TYPE_CHECKING:
    from pipeline.cost.flops import ClipSize, Size

CORE_FLOPS = 50e9  # a second, that networks reach on one core
UTILISATION = 0.3  # of a GPU's bf16 peak
FP32_UTILISATION = 0.5  # of its fp32 peak, which is much lower
MATMUL_SHARE = 0.75  # of the bf16 peak that large matrix products reach: what a measured utilisation is a share of
# Of the host, for one kernel: 3,000 small ones took 15 ms alone, 31 to 36 ms beside a busy feed (2 cores, 2026-11-30).
LAUNCH_SECONDS = 1e-5  # compiled layers launch fewer; nobody has counted how many
LAUNCHES = 3  # kernels of a step for each of its forward pass; 2.7 of small's decoder (docs/gpu-check.md)
# Of a worker, for the forward and the backward pass of a layer. A guess: nothing here was compiled for a GPU. nanoGPT
# says that twelve equal blocks take a minute; the stages of a U-Net are all different.
COMPILE_SECONDS = 15.0
PART_SECONDS = 0.016  # of Ray's driver, for one part of a shard to a decoder and an encoder: 13 to 19 ms, 2026-12-02
DECODE_SECONDS = 0.004  # of one core, to read a stored image and shrink it to CLIP's view
START_SECONDS = {"data": 6.0, "training": 5.0, "gpus": 60.0}
FETCH_WEIGHTS_SECONDS = 60.0
REFERENCE_BYTES = 300  # of a row in each data stage, besides what it makes
SAVED_BYTES = 1e9  # of a checkpoint that a worker writes in a second
COPIED_BYTES = 20e9  # that a GPU copies in a second, while it does nothing else
MODEL_BYTES = 4  # a parameter of an artefact
JOINED_BYTES = 1500  # of a row that a training has read besides its embeddings: captions, key, place


@dataclass(frozen=True)
class PlanInput:
    """What is planned.

    Attributes:
        config: Configuration of the project.
        graph: Stages of the configuration.
        rows: Pairs in the list.
        held_out: Share of them that an evaluation may look at.
        unread: Rows that a run has yet to read of a list that was opened, in one process; None for a list of any kind.
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
    unread: int | None = None
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
        between: Least and most seconds by the single measurements, where they were repeated; None elsewhere.
    """

    seconds: float
    startup: float = 0.0
    basis: str = "guess"
    cores: float = 0.0
    gpus: float = 0.0
    disk: float = 0.0
    between: tuple[float, float] | None = None


def estimate(stage: str, ask: PlanInput) -> Cost:
    """Returns what making a stage again costs. Raises UserError for a CLIP that open_clip does not know."""
    workers, held, gpus = resources(stage, ask)
    seen = [] if ask.fleet and gpus else ask.observations(stage)
    if ask.computes(stage) and (gpus or (ask.looked and ask.machine.local)):
        seen = [one for one in seen if (one.device == "cuda") == bool(gpus)]
    between = None
    if seen:
        gpus, basis = gpus or (workers if seen[-1].device == "cuda" else 0), "measured"
        points = [(_amount_seen(stage, one, ask), one) for one in seen]
        found = paces(points, amount(stage, ask), workers, _hosts_seconds(stage, ask, workers) if gpus else 0.0)
        startup, seconds = median(start for start, _ in found), median(whole for _, whole in found)
        if len(found) > 1:
            between = found[0][1], found[-1][1]
    else:
        startup, rest = _counted(stage, ask, workers, bool(gpus))
        seconds, basis = startup + rest, "counted" if gpus else "guess"
    held = 0 if gpus and ask.graph[stage].kind == "training" else held
    return Cost(seconds, startup, basis, held, gpus, _disk(stage, ask), between)


def training_team(stage: str, ask: PlanInput) -> WorkerGroup | None:
    """Returns the workers of a training; None for another stage, and where this process trains."""
    if ask.graph[stage].kind != "training" or ask.fetches(stage):
        return None
    batch = ask.graph[stage].recipe.batch  # of which every worker has a row
    if ask.fleet:
        count = min(ask.fleet.count, batch)
        return WorkerGroup(count, count, Resources(0.0, 1.0))
    settings = getattr(ask.config.run, stage)
    team = team_of(settings, ask.machine, batch)
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
        if team := training_team(stage, ask):
            return team.count, team.count * team.worker.cpus, team.count * team.worker.gpus
        on_gpu = there and ask.machine.local and settings.device != "cpu"  # type: ignore[union-attr]
        return 1, ask.machine.cpus, int(bool(on_gpu))
    if kind == "result":
        return (1, 0, 1) if there else (1, ask.machine.cpus, 0)
    if settings is None or kind not in ("source", "data"):  # in the driver
        return 1, 1, 0
    if kind == "source":  # an unknown list as if it were a folder of files
        tasks = 0 if ask.unread is not None else round(ask.rows * REFERENCE_BYTES / LIST_TASK_BYTES)
        count = max(1, team_of(settings, ask.machine, tasks).count)
        return count, count, 0
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
    return _work(stage, _rows(stage, ask), ask)


def _rows(stage: str, ask: PlanInput) -> float:
    """Returns the rows that a stage reads itself."""
    kind = ask.graph[stage].kind
    if kind == "source" and ask.unread is not None:
        return ask.unread
    return 0 if kind == "bundle" else ask.rows


def row_seconds(stage: str, rows: float, ask: PlanInput) -> float:
    """Returns the seconds of one core that are assumed for one of ``rows`` rows; 0 where networks make them."""
    node = ask.graph[stage]
    return node.row_seconds(node.recipe, rows) if node.row_seconds else 0.0


def _work(stage: str, rows: float, ask: PlanInput) -> float:
    """Returns what the time of a stage of rows grows with: rows, weighted by the time that each takes."""
    return rows * (row_seconds(stage, rows, ask) or 1.0)


def _amount_seen(stage: str, one: Observation, ask: PlanInput) -> float:
    if one.passes:
        return _operations(one.passes, ask)
    return one.amount if ask.graph[stage].kind == "training" else _work(stage, one.amount, ask)


def _operations(passes: Mapping[str, float], ask: PlanInput) -> float:
    return sum(count * model_size(ask.config, name).forward for name, count in passes.items())


def _counted(stage: str, ask: PlanInput, workers: int, on_gpus: bool) -> tuple[float, float]:
    """Returns seconds that do not grow, and seconds that do."""
    node = ask.graph[stage]
    if ask.fetches(stage):
        return FETCH_WEIGHTS_SECONDS, 0.0
    if node.kind == "training":
        if on_gpus:
            return _trained(stage, ask, workers)
        work = node.recipe.samples * model_size(ask.config, stage).training
        return START_SECONDS["training"], work / (resources(stage, ask)[1] * CORE_FLOPS)
    if node.kind == "result":
        precision = ask.config.bundle.sampling.precision
        return 0.0, amount(stage, ask) / (rate(ask, precision) if on_gpus else ask.machine.cpus * CORE_FLOPS)
    if on_gpus:
        decoders = resources(stage, ask)[1] or workers  # a worker without helpers decodes on a thread of its own
        each = max(encode_seconds(ask), decode_seconds(ask) * workers / decoders)
        return START_SECONDS["gpus"], ask.rows * max(each / workers, driver_seconds(ask))
    rows = _rows(stage, ask)
    each = row_seconds(stage, rows, ask)
    if any(ask.graph[name].kind == "training" for name in node.inputs):
        each += encode_seconds(ask) + decode_seconds(ask)
    return START_SECONDS["data"] if workers > 1 else 0.0, each * rows / workers


def _trained(stage: str, ask: PlanInput, workers: int) -> tuple[float, float]:
    """Returns the same of a training on GPUs."""
    recipe, settings, size = ask.graph[stage].recipe, getattr(ask.config.run, stage), model_size(ask.config, stage)
    seconds = recipe.samples / recipe.batch * max(step_seconds(stage, ask, workers))
    saved, every = save(stage, ask, workers)
    compiles = settings.compile is True or (settings.compile == "auto" and seconds > COMPILE_PAYS_S)
    # The last checkpoint is waited for, the others only copied.
    startup = START_SECONDS["gpus"] + saved / SAVED_BYTES + compiles * size.layers * COMPILE_SECONDS
    return startup, seconds * (1 + saved / COPIED_BYTES / every)


def _hosts_seconds(stage: str, ask: PlanInput, workers: int) -> float:
    """Returns the seconds that no number of GPUs saves: of Ray's driver, or of hosts that launch kernels."""
    if ask.encodes(stage):
        return ask.rows * driver_seconds(ask)
    if ask.graph[stage].kind != "training" or ask.fetches(stage):
        return 0.0
    recipe = ask.graph[stage].recipe
    return recipe.samples / recipe.batch * step_seconds(stage, ask, workers)[1]


def step_of(stage: str, ask: PlanInput, workers: int) -> Footprint:
    """Returns what a step of a training takes of the GPU that has most rows."""
    settings, memory = getattr(ask.config.run, stage), ask.device.memory
    return footprint(model_size(ask.config, stage), ask.graph[stage].recipe, settings, workers, memory)


def worker_memory(stage: str, ask: PlanInput, workers: int) -> float:
    """Returns the bytes that one worker of a training takes of its host."""
    node, settings, size = ask.graph[stage], getattr(ask.config.run, stage), model_size(ask.config, stage)
    stored = max(row_bytes(name, ask) for name in node.inputs)  # of an input: an image's
    image = stored if hasattr(node.recipe.model, "image_size") else 0.0
    embeddings = 2 * 4.0 * clip_size(ask.config.clip).dim if "embeddings" in node.inputs else 0.0
    shard = min(ask.rows, ask.config.source.shard_rows) * (JOINED_BYTES + embeddings)
    return host_memory(size, node.recipe, settings, workers, image, shard)


def step_seconds(stage: str, ask: PlanInput, workers: int) -> tuple[float, float]:
    """Returns the seconds in which a GPU computes a step, and those in which its host launches the kernels."""
    recipe, size, step = ask.graph[stage].recipe, model_size(ask.config, stage), step_of(stage, ask, workers)
    # Another forward pass: of layers, or of a contrastive loss that takes its rows in parts.
    again = getattr(ask.config.run, stage).recompute or (isinstance(recipe, ClipRecipe) and step.passes > 1)
    computing = step.rows * (size.training + again * size.forward) / rate(ask, recipe.precision, stage)
    return computing, step.passes * (LAUNCHES + again) * size.kernels * LAUNCH_SECONDS


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
    model = model_size(ask.config, stage)
    size = SAVED_STATE * model.parameters / state_parts(model, settings, workers, ask.device.memory)
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


def driver_seconds(ask: PlanInput) -> float:
    """Returns the seconds of Ray's driver for one row of the embeddings, which it hands on in parts of shards."""
    rows = min(ask.config.source.shard_rows, TASK_BYTES // (3 * clip_size(ask.config.clip).side ** 2))
    return PART_SECONDS / max(1, rows)


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
