"""What a stage will cost: time, cores, GPUs, bytes and requests. Measured where it was measured, else by analysis.

Runs nothing. What a profile has seen is scaled by rows, samples and workers (pipeline.cost.profile). Other stages, and
all trainings on GPUs that are asked for, are counted: the arithmetic of their networks over what the machines can do.
The constants below are what is assumed then.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.config import TRAININGS, Config
from pipeline.cost.fleet import Device, Fleet
from pipeline.cost.flops import clip_size, model_size
from pipeline.cost.profile import COUNTED, Observation, Profile, fit, pace, passes_of, shape
from pipeline.graph.keys import flatten
from pipeline.training.recipes import ClipRecipe, TrainingRecipe

CORE_FLOPS = 50e9  # a second, that networks reach on one core
UTILISATION = 0.3  # of a GPU's bf16 peak
FP32_UTILISATION = 0.5  # of its fp32 peak, which is much lower
MATMUL_SHARE = 0.75  # of the bf16 peak that large matrix products reach: what a measured utilisation is a share of
CORE_SECONDS = {  # of one core for a row
    "source": 32e-6,
    "captions": 1e-6,
    "pairs": 0.02,
    "thresholds": 1e-4,
    "curation": 2e-4,
    "index": 5e-5,
    "codec": 2e-4,
}
CELLED_ROWS = 8e6  # up to which near rows are looked for in cells of one size (docs/near-duplicates.md)
DECODE_SECONDS = 0.004  # of one core, to read a stored picture and shrink it to CLIP's view
START_SECONDS = {"data": 6.0, "training": 5.0, "gpus": 60.0}
FETCH_WEIGHTS_SECONDS = 60.0
BYTES_A_PIXEL = 0.25  # of a stored picture, as wide as it is high
REFERENCE_BYTES = 300  # of a row in source, pairs' index, captions and keep-lists, each
STATE_BYTES, MODEL_BYTES = 16, 4  # a parameter: weights, average and two moments of a checkpoint; of an artefact
LOCAL = ("samples", "evaluation")  # stages of one process with all cores, or one GPU


@dataclass(frozen=True)
class Ask:
    """What is planned: ``rows`` pairs of a configuration, with what is known, and maybe on a ``fleet`` of GPUs."""

    config: Config
    rows: int
    profile: Profile = field(default_factory=Profile)
    fleet: Fleet | None = None
    utilisation: float = UTILISATION

    @cached_property
    def recipes(self) -> dict[str, dict[str, Any]]:
        """Flattened, by stage."""
        names = (*TRAININGS, *CORE_SECONDS, "embeddings", "bundle", "samples", "evaluation")
        return {name: flatten(getattr(self.config, "source" if name == "captions" else name)) for name in names}

    @property
    def shards(self) -> int:
        return -(-self.rows // self.config.source.shard_rows)


@dataclass(frozen=True)
class Cost:
    """Of one stage. ``startup`` is the part of ``seconds`` that does not grow; ``basis``: "measured", "counted" from
    arithmetic, or "guess". ``cores`` and ``gpus`` are held for all that time. ``disk``: bytes that stay in the store;
    ``read`` and ``written`` bytes, ``gets`` and ``puts`` requests that go to it."""

    seconds: float
    startup: float = 0.0
    basis: str = "guess"
    cores: float = 0.0
    gpus: float = 0.0
    disk: float = 0.0
    read: float = 0.0
    written: float = 0.0
    gets: float = 0.0
    puts: float = 0.0


def estimate(stage: str, ask: Ask) -> Cost:
    """What making a stage anew costs. Raises UserError through ``clip_size`` for a CLIP that nobody knows."""
    workers, cores, gpus = resources(stage, ask)
    seen = ask.profile.of(stage, shape(stage, ask.recipes))
    if seen and not (gpus and stage in (*TRAININGS, "embeddings", *LOCAL) and ask.fleet):
        points = [(_amount_seen(stage, one, ask), one) for one in seen]
        found, basis = pace(points), "measured"
        seconds, startup = found.seconds(amount(stage, ask), workers), found.startup(workers)
        gpus = gpus or (workers if seen[-1].device == "cuda" else 0)
    else:
        startup, rest = _counted(stage, ask, workers, gpus, seen)
        seconds, basis = startup + rest, "counted" if gpus else "guess"
    return Cost(
        seconds, startup, basis, 0 if gpus and stage in TRAININGS else cores, gpus, **_stored(stage, ask, seconds)
    )


def resources(stage: str, ask: Ask) -> tuple[int, float, float]:
    """Workers of a stage, and all of their cores and GPUs together."""
    recipe, settings = getattr(ask.config, stage, None), getattr(ask.config.run, stage, None)
    if isinstance(recipe, TrainingRecipe):
        if isinstance(recipe, ClipRecipe) and recipe.weights != "train":
            return 1, 1, 0
        if ask.fleet:
            workers = min(ask.fleet.count, recipe.lanes)  # no lane is shared
            return workers, 0, workers
        return max(1, settings.workers), max(settings.workers, cores_here()), 0  # type: ignore[union-attr]
    if stage == "embeddings":
        settings = ask.config.run.embeddings
        if ask.fleet:
            workers = ask.fleet.count
            decoders = settings.decoders or max(1, round(cores_a_gpu(ask)))
            return workers, workers * decoders, workers
        workers = max(1, min(settings.workers, ask.shards))
        return workers, workers * ((not settings.gpus) + settings.decoders), workers * settings.gpus
    if stage in LOCAL:
        return 1, 0 if ask.fleet else cores_here(), 1 if ask.fleet else 0
    if settings is None:  # source, captions, bundle: in the driver
        return 1, 1, 0
    workers = max(1, min(settings.workers, ask.shards))
    return workers, workers, 0


def cores_here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def amount(stage: str, ask: Ask) -> float:
    """What the time of a stage grows with: samples, operations of networks that draw, or rows."""
    recipe = getattr(ask.config, stage, None)
    if isinstance(recipe, TrainingRecipe):
        return 1 if isinstance(recipe, ClipRecipe) and recipe.weights != "train" else recipe.samples
    if stage in COUNTED:
        seen = ask.profile.of(stage, shape(stage, ask.recipes))
        there = {part: round(share * ask.rows) for one in seen[-1:] for part, share in one.short.items()}
        return _operations(passes_of(stage, ask.recipes, there), ask)
    return 0 if stage == "bundle" else _rows_counted(stage, ask.rows, ask)


def _rows_counted(stage: str, rows: float, ask: Ask) -> float:
    """Rows, each of them as often as its cell of near rows is larger than cells are while their number grows."""
    c = ask.config.curation
    compared = c.near_duplicate is not None or c.near_held_out is not None
    return rows * max(1.0, rows / CELLED_ROWS) if stage == "curation" and compared else rows


def _amount_seen(stage: str, one: Observation, ask: Ask) -> float:
    return _operations(one.passes, ask) if one.passes else _rows_counted(stage, one.amount, ask)


def _operations(passes: Mapping[str, float], ask: Ask) -> float:
    return sum(count * model_size(ask.config, name).forward for name, count in passes.items())


# --- by analysis ------------------------------------------------------------------------------------------------------


def _counted(stage: str, ask: Ask, workers: int, gpus: float, seen: list[Observation]) -> tuple[float, float]:
    """Seconds that do not grow, and those that do."""
    recipe = getattr(ask.config, stage, None)
    if isinstance(recipe, TrainingRecipe):
        if isinstance(recipe, ClipRecipe) and recipe.weights != "train":
            return FETCH_WEIGHTS_SECONDS, 0.0
        work = recipe.samples * model_size(ask.config, stage).training
        if ask.fleet:
            return START_SECONDS["gpus"], work / (workers * rate(ask, recipe.precision, seen))
        return START_SECONDS["training"], work / (cores_here() * CORE_FLOPS)
    if stage in COUNTED:
        work = amount(stage, ask)
        return 0.0, work / (rate(ask, "bf16", []) if ask.fleet else cores_here() * CORE_FLOPS)
    if stage == "embeddings":
        clip = clip_size(ask.config.clip)
        one = clip.image + clip.text
        if ask.fleet:
            encode = one / rate(ask, "fp32", [])
            decoders = resources(stage, ask)[1] / workers
            return START_SECONDS["gpus"], ask.rows * max(encode, decode_seconds(ask) / decoders) / workers
        return START_SECONDS["data"], ask.rows * (one / CORE_FLOPS + decode_seconds(ask)) / workers
    started = START_SECONDS["data"] if workers > 1 else 0.0
    return started, CORE_SECONDS.get(stage, 0.0) * amount(stage, ask) / workers


def rate(ask: Ask, precision: str, seen: list[Observation]) -> float:
    """Operations a second of one GPU of the fleet: as trainings of ``seen`` used theirs, else as assumed."""
    device: Device = ask.fleet.device  # type: ignore[union-attr]
    if precision == "fp32":
        return device.fp32 * FP32_UTILISATION
    used = [one.utilisation for one in seen if one.device == "cuda" and one.utilisation]
    return device.peak * (used[-1] * MATMUL_SHARE if used else ask.utilisation)


def decode_seconds(ask: Ask) -> float:
    """Of one core, for one picture on its way to CLIP: measured if any profile has it."""
    seen = ask.profile.of("embeddings", shape("embeddings", ask.recipes))
    found = [one.steps["decode_seconds"] / one.amount for one in seen if one.steps.get("decode_seconds")]
    return found[-1] if found else DECODE_SECONDS


def encode_seconds(ask: Ask) -> float:
    """Of one core, or one GPU of the fleet, for one pair."""
    if not ask.fleet:
        seen = ask.profile.of("embeddings", shape("embeddings", ask.recipes))
        found = [one.steps["encode_seconds"] / one.amount for one in seen if one.steps.get("encode_seconds")]
        if found:
            return found[-1]
    clip = clip_size(ask.config.clip)
    return (clip.image + clip.text) / (rate(ask, "fp32", []) if ask.fleet else CORE_FLOPS)


def cores_a_gpu(ask: Ask) -> float:
    """Cores that have to decode for one encoder, so that it never waits."""
    return decode_seconds(ask) / encode_seconds(ask)


# --- bytes and requests -----------------------------------------------------------------------------------------------


def picture_bytes(ask: Ask) -> float:
    """Of a stored picture: measured if the profile has pairs."""
    seen = ask.profile.of("pairs", shape("pairs", ask.recipes))
    found = [one.disk / one.amount for one in seen if one.disk]
    return found[-1] if found else BYTES_A_PIXEL * ask.config.pairs.image_size**2


def embedding_bytes(ask: Ask) -> float:
    """Of a pair's two embeddings: float16."""
    return 2 * 2 * clip_size(ask.config.clip).dim


def _indexed_bytes(ask: Ask) -> float:
    """Of a row of the index: an embedding, or, of many, a code and a number."""
    flat = ask.rows <= ask.config.index.flat_rows
    return embedding_bytes(ask) / 2 if flat else embedding_bytes(ask) / 32 + 8


def _stored(stage: str, ask: Ask, seconds: float) -> dict[str, float]:
    """Disk, bytes and requests of a stage. What a profile has seen goes before what is assumed."""
    recipe, shards, rows = getattr(ask.config, stage, None), ask.shards, ask.rows
    if isinstance(recipe, TrainingRecipe):
        found = _stored_by_training(stage, recipe, ask, seconds)
    else:
        own = {"pairs": picture_bytes(ask), "embeddings": embedding_bytes(ask), "index": _indexed_bytes(ask)}
        disk = rows * (own.get(stage, 0.0) + REFERENCE_BYTES) if stage in (*CORE_SECONDS, "embeddings") else 0.0
        inputs = {
            "embeddings": picture_bytes(ask),
            "thresholds": embedding_bytes(ask),
            "curation": embedding_bytes(ask),
            "index": embedding_bytes(ask),
            "codec": 2 * embedding_bytes(ask),
        }
        batches = rows / ask.config.run.embeddings.batch if stage == "embeddings" else 0.0
        files = 0 if stage in (*COUNTED, "bundle") else shards
        found = {"disk": disk, "read": rows * inputs.get(stage, 0.0), "written": disk}
        found |= {"gets": 3 * files + batches, "puts": 3 * files}
    seen = ask.profile.of(stage, shape(stage, ask.recipes))
    if not seen or stage in COUNTED:
        return found

    size = amount(stage, ask) if isinstance(recipe, TrainingRecipe) else rows

    def line(*names: str) -> float:
        """The sum of these counts: of a data stage bytes grow with rows, and requests with shards."""
        by_shard = seen[0].shards and not names[0].startswith("bytes")
        points = [(one.shards if by_shard else one.amount, sum(one.requests.get(n, 0) for n in names)) for one in seen]
        return fit(points).at(shards if by_shard else size)

    found |= {"read": line("bytes_read"), "gets": line("GET", "HEAD")}
    if not isinstance(recipe, TrainingRecipe):
        disk = fit((one.amount, one.disk) for one in seen).at(size)
        found |= {"puts": line("PUT", "LIST"), "disk": disk, "written": max(disk, line("bytes_written"))}
    return found


def _stored_by_training(stage: str, recipe: TrainingRecipe, ask: Ask, seconds: float) -> dict[str, float]:
    """A model, the checkpoints that stay, and all that were written on the way; every sample is read once."""
    parameters, settings = model_size(ask.config, stage).parameters, getattr(ask.config.run, stage)
    if isinstance(recipe, ClipRecipe) and recipe.weights != "train":
        return {"disk": MODEL_BYTES * parameters, "written": MODEL_BYTES * parameters, "puts": 6.0}
    every = settings.checkpoint_every_s or seconds * recipe.batch / recipe.samples  # 0 saves after each step
    saved = 2 + (seconds / every if seconds else 0)
    kept = settings.keep_checkpoints * STATE_BYTES * parameters
    needs_pictures = stage not in ("ar_prior", "diffusion_prior")
    needs_embeddings = stage in ("ar_prior", "diffusion_prior", "decoder")
    read = needs_pictures * picture_bytes(ask) + needs_embeddings * embedding_bytes(ask) + REFERENCE_BYTES
    tables = 2 + needs_embeddings
    return {
        "disk": MODEL_BYTES * parameters + kept,
        "read": recipe.samples * read,
        "written": saved * STATE_BYTES * parameters + MODEL_BYTES * parameters,
        # A window is one range of one tar, or of two; the tables of a shard are read whole and kept while it lasts.
        "gets": recipe.samples * (needs_pictures * 1.5 / recipe.window + tables / ask.config.source.shard_rows),
        "puts": saved * 8,
    }
