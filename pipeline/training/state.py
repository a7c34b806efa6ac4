"""What a training is at one moment: weights, their average, the optimiser's moments, and the journal so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from models.draw import derive_seed
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.task import Task

NORMALISATIONS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


@dataclass
class Journal:
    """A training's metrics as JSON lines. They hold no times, so that equal trainings have equal journals.

    ``sums`` and ``steps`` are what the next training line averages over; sums stay on the device, so that adding to
    them waits for nothing.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, Tensor | float] = field(default_factory=dict)
    steps: int = 0

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Count one step's values, each fp64 []."""
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def flush(self, samples: int) -> None:
        """Write the mean since the last line."""
        self.lines.append({"samples": samples, **{name: float(s) / self.steps for name, s in self.sums.items()}})
        self.sums, self.steps = {}, 0

    def as_json(self) -> dict[str, Any]:
        """The fields as a checkpoint's record holds them."""
        return {"lines": self.lines, "sums": {name: float(s) for name, s in self.sums.items()}, "steps": self.steps}

    def latest(self) -> dict[str, Any]:
        """The latest value of everything that was measured."""
        merged = {name: value for line in self.lines for name, value in line.items()}
        return {name: value for name, value in merged.items() if name not in ("samples", "preview")}

    def previews(self) -> dict[str, str]:
        """Blobs of pictures by the names that they have in an artefact; "preview.png" is the last."""
        found = {f"previews/{line['samples']:012d}.png": line["preview"] for line in self.lines if "preview" in line}
        return found | ({"preview.png": list(found.values())[-1]} if found else {})

    def text(self) -> bytes:
        """The lines as a file."""
        return "".join(json.dumps(line, sort_keys=True) + "\n" for line in self.lines).encode()


@dataclass
class TrainState:
    """Everything that a checkpoint holds. ``ema`` is a whole model, so that it can be used as one.

    ``laps`` are seconds by what they went to (see pipeline.training.laps). ``failed``, fp32 [] on the device, becomes 1
    with the first gradient or loss that is not finite; from then on the optimiser leaves everything as it is.
    """

    model: nn.Module
    ema: nn.Module
    optimizer: AdamW
    samples: int = 0
    seconds: float = 0.0
    laps: dict[str, float] = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal)
    failed: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        # The fused AdamW reads it on the device: nobody has to wait in each step to learn whether to take it.
        self.optimizer.found_inf = self.failed  # type: ignore[attr-defined]


def begin(
    task: Task, recipe: TrainingRecipe, device: torch.device, warm: Callable[[nn.Module], None] | None = None
) -> TrainState:
    """The state before the first sample. Random weights depend on the recipe's seed alone; ``warm`` gives others."""
    model = task.model(derive_seed(recipe.seed, "model")).to(device)
    if warm is not None:
        warm(model)
    ema = deepcopy(model).eval().requires_grad_(False)
    return TrainState(model, ema, make_optimizer(model, recipe), failed=torch.zeros((), device=device))


def make_optimizer(model: nn.Module, recipe: TrainingRecipe) -> AdamW:
    """Adam with decoupled weight decay on matrices and kernels; none on norms, biases, embeddings and other vectors."""
    spared = {id(p) for m in model.modules() if isinstance(m, (*NORMALISATIONS, nn.Embedding)) for p in m.parameters()}
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1 and id(p) not in spared]
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.beta2), eps=recipe.eps, fused=True)


def learning_rate(recipe: TrainingRecipe, samples: int) -> float:
    """The rate of the step that ends at ``samples``: a linear rise over ``warmup`` samples, then constant, and a linear
    fall over the last ``decay``, whose first step still has the full rate."""
    rise = min(1.0, samples / recipe.warmup) if recipe.warmup else 1.0
    left = (
        1.0 - (samples - recipe.batch - recipe.fork) / recipe.decay if recipe.decay and samples > recipe.fork else 1.0
    )
    return recipe.learning_rate * rise * left


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, samples: int, half_life: float) -> None:
    """Move the average towards the model by one step of ``samples`` samples; statistics of norms are copied."""
    decay = 0.5 ** (samples / half_life) if half_life else 0.0
    averaged, current = ([p.detach() for p in m.parameters()] for m in (ema, model))
    torch._foreach_lerp_(averaged, current, 1.0 - decay)
    for average, value in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(value)


def optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """The optimiser's moments and step counts by the names of the parameters."""
    return {
        f"{name}:{kind}": value
        for name, parameter in state.model.named_parameters()
        for kind, value in state.optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``."""
    parameters = dict(state.model.named_parameters())
    state.optimizer.state.clear()
    for full_name, value in tensors.items():
        name, _, kind = full_name.rpartition(":")
        parameter = parameters[name]
        where = torch.device("cpu") if kind == "step" else parameter.device
        state.optimizer.state[parameter][kind] = value.to(where)
