"""Counts what a training takes of a GPU's memory, how many rows fit into it at once, and which setting lets it fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.graph.resources import WORKER_BYTES
from pipeline.settings import STATE_BYTES, TrainingSettings
from pipeline.training.recipes import ClipRecipe, TrainingRecipe

if TYPE_CHECKING:
    from pipeline.cost.flops import Size

SAVED_STATE = 16  # bytes a parameter of a checkpoint: weight, average and two moments
USABLE = 0.9  # of a GPU's memory: CUDA, cuBLAS and NCCL have buffers in it, and PyTorch's allocator leaves gaps
NODE = 8  # GPUs of a node, over which a sharded model lies where half of their memory holds it
LOGITS = 6  # tensors [rows, batch] of a contrastive loss in fp32: two of logits, their softmax, and gradients
REMEDIES: tuple[Mapping[str, Any], ...] = (  # in the order of what they cost
    {"recompute": True},
    {"sharded": True},
    {"sharded": True, "recompute": True},
    {"sharded": True, "offload": True, "recompute": True},
)


@dataclass(frozen=True)
class Footprint:
    """What a step takes of the GPU that has most rows.

    Attributes:
        rows: Rows of a step.
        at_once: Rows that are computed at once: all, a half, a quarter and so on; the least that there can be where
            not even they fit.
        memory: Bytes at the peak.
        fits: They are there.
    """

    rows: int
    at_once: int
    memory: float
    fits: bool

    @property
    def passes(self) -> int:
        """Returns the forward and backward passes of a step."""
        return -(-self.rows // self.at_once)


def footprint(size: Size, recipe: TrainingRecipe, settings: TrainingSettings, workers: int, memory: float) -> Footprint:
    """Returns what a step takes of one of ``workers`` GPUs with ``memory`` bytes each."""
    parameters, rows = size.parameters, -(-recipe.batch // workers)
    width = 1.0 if recipe.precision == "bf16" else 2.0
    # Weights in bf16 are kept for the backward pass; of a sharded model one layer's, and the next one's.
    held = 2.0 * parameters * (2 / size.layers if settings.sharded else 1)
    if not settings.offload:
        held += STATE_BYTES * parameters / state_parts(size, settings, workers, memory)
    whole = False
    if isinstance(recipe, ClipRecipe):
        held += LOGITS * 4.0 * rows * recipe.batch
        whole = recipe.model.tower == "resnet"  # whose batch norms see all rows of a pass
    each = width * (size.recomputed if settings.recompute else size.activations)
    at_once = rows if whole else min(settings.micro_batch or rows, rows)
    while at_once > 1 and not whole and held + at_once * each > USABLE * memory:
        at_once = -(-at_once // 2)
    taken = held + at_once * each
    return Footprint(rows, at_once, taken, taken <= USABLE * memory)


def state_parts(size: Size, settings: TrainingSettings, workers: int, memory: float) -> int:
    """Returns over how many of ``workers`` GPUs with ``memory`` bytes each a copy of a model and its state lies."""
    if not settings.sharded:
        return 1
    return NODE if workers % NODE == 0 and 2 * STATE_BYTES * size.parameters <= NODE * memory else workers


def host_memory(
    size: Size, recipe: TrainingRecipe, settings: TrainingSettings, workers: int, image: float, shard: float
) -> float:
    """Returns the most bytes that one of ``workers`` takes of its host.

    Args:
        size: Size of the model.
        recipe: Recipe of the training.
        settings: Its settings.
        workers: Number of workers.
        image: Bytes of an encoded image, 0 where none is read.
        shard: Bytes of what is read of a shard besides.
    """
    lanes = min(recipe.lanes, -(-recipe.lanes // workers) + 1)
    # The model and its average are built on the CPU, of a sharded one the model on rank 0; a checkpoint lies in pinned
    # memory until it is written, and one that is restored lies in memory, too.
    model = (max(4.0, SAVED_STATE / workers) if settings.sharded else SAVED_STATE) * size.parameters
    # Tables have room for two shards of a lane, whose windows lie in both for a while.
    return WORKER_BYTES + model + settings.cache_mb * 2**20 + lanes * (1.25 * recipe.window * image + 2 * shard)


def settings_that_fit(
    stage: str, size: Size, recipe: TrainingRecipe, settings: TrainingSettings, workers: int, memory: float
) -> str:
    """Returns the settings that let a training fit, as they are written behind a command; "" where none does."""
    for changes in REMEDIES:
        if changes.get("sharded") and (workers == 1 or isinstance(recipe, ClipRecipe)):
            continue
        if footprint(size, recipe, replace(settings, **changes), workers, memory).fits:
            return " ".join(f"run.{stage}.{name}=true" for name in changes)
    return ""
