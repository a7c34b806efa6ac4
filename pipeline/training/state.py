"""The state of a training: weights, their average, the optimiser's moments, and the journal so far.

How it begins, what a step does to its average and learning rate, and how a checkpoint takes it apart and puts it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.precision import computes_in
from models.random_streams import derive_seed
from pipeline.errors import UserError
from pipeline.parse import ContentFile
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.distributed.sharding import fill, local, recompute
from pipeline.training.journal import MetricsJournal
from pipeline.training.optimizer import kinds, make_optimizer
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.task import Finishes, Objective, Shardable, Task

MEMORY = 0.1
"""The half-life of the averaged weights is at most this part of the samples seen."""
SHOWN_NAMES = 3  # of a kind, in a message


@dataclass
class TrainState:
    """Holds everything that a checkpoint saves.

    Attributes:
        objective: The loss around the model.
        ema: The averaged weights, as a model that can be used.
        optimizer: Optimiser, with the moments.
        samples: Samples seen so far.
        seconds: Seconds of the training so far.
        phase_seconds: Seconds by phase (see pipeline.training.timing).
        journal: The metrics so far.
        failed: Flag, [] of bool: a loss or a gradient was not finite, so that nothing of the state is to be kept.
    """

    objective: Objective
    ema: nn.Module
    optimizer: AdamW
    samples: int = 0
    seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    journal: MetricsJournal = field(default_factory=MetricsJournal)
    failed: Tensor = field(default_factory=lambda: torch.tensor(False))

    @property
    def model(self) -> nn.Module:
        return self.objective.model


def begin(
    task: Task,
    recipe: TrainingRecipe,
    group: ProcessGroup,
    warm: Callable[[nn.Module], None] | None = None,
    recomputing: bool = False,
) -> TrainState:
    """Returns the state before the first sample.

    Args:
        task: Task that makes the model.
        recipe: Recipe, whose seed decides the random weights.
        group: Places the model.
        warm: Gives the model other weights.
        recomputing: Recomputes layers in the backward pass (activation checkpointing).
    """
    # Rank 0 alone makes the weights of a sharded model, and sends them: no other worker ever holds all of them.
    whole = task.model(derive_seed(recipe.seed, "model")) if group.is_rank_0 or not group.sharded else None
    if whole is not None and warm is not None:
        warm(whole)
    if group.sharded:
        assert isinstance(task, Shardable)
        model, ema = task.empty(), task.empty()
    else:
        assert whole is not None
        model, ema = whole, deepcopy(whole)
    ema.eval().requires_grad_(False)
    if recomputing:
        recompute(model)
    objective = Objective(task, model)
    # Alike on all workers: of unlike machines each would go another way.
    half = all(group.collect([computes_in(group.device, recipe.precision) == "bf16"]))
    group.place(objective, half)
    group.place(ema)
    if group.sharded:
        fill(objective, None if whole is None else Objective(task, whole), group.device, group.offload)
        fill(ema, whole, group.device, group.offload)
    return TrainState(objective, ema, make_optimizer(model, recipe, half))


def load_weights(stage: str, file: ContentFile, data: bytes, task: Task, model: nn.Module) -> None:
    """Gives ``model`` the weights of a file, except those that its task measures when it is finished, and frozen ones.

    What is frozen in a model is of this run's CLIP, which need not be the file's. ``data`` are the file's bytes.
    Raises UserError if names or shapes are not those of the model.
    """
    where = f"{stage}.init_from: {file.path or file[:12]}"
    measured = task.measured if isinstance(task, Finishes) else ()
    try:
        tensors = {name: tensor for name, tensor in load(data).items() if name not in measured}
    except SafetensorError as e:
        raise UserError(f"{where} is not a safetensors file ({e})") from e
    wanted = model.state_dict()
    if tensors.keys() != wanted.keys():  # a CLIP is stored without its wrapper
        inner = {f"model.{name}": tensor for name, tensor in tensors.items()}
        tensors = inner if inner.keys() == wanted.keys() else tensors
    if problems := _differences(tensors, wanted):
        raise UserError(f"{where} does not fit {stage}.model: {'; '.join(problems)}")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    model.load_state_dict(tensors | {name: wanted[name] for name in frozen})


def _differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    shapes = [
        f"{name} is {list(found[name].shape)} and should be {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = {"missing": [n for n in wanted if n not in found], "unknown": [n for n in found if n not in wanted]}
    said = [f"{what}: {_some(names)}" for what, names in kinds.items() if names]
    return [_some(shapes), *said] if shapes else said


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN_NAMES]) + (
        f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    )


def learning_rate(recipe: TrainingRecipe, samples: int) -> float:
    """Returns the rate of the step that ends at ``samples``.

    It rises linearly over ``warmup_steps``, is constant, and falls linearly over the last ``decay`` samples, whose
    first step has the full rate.
    """
    rise = min(1.0, samples / (recipe.warmup_steps * recipe.batch)) if recipe.warmup_steps else 1.0
    left = (
        1.0 - (samples - recipe.batch - recipe.fork) / recipe.decay if recipe.decay and samples > recipe.fork else 1.0
    )
    return recipe.learning_rate * rise * left


def ema_half_life(recipe: TrainingRecipe, samples: int) -> float:
    """Returns the half-life, in samples, of the average in the step that ends at ``samples``.

    The recipe's, and at most ``MEMORY`` of the samples before that step (Karras et al. 2022, EDM's
    ``ema_rampup_ratio``, there 0.05): after one step nothing is left of the random start, and however early a training
    stops, its average is of the last of its weights.
    """
    return min(recipe.ema_half_life, MEMORY * (samples - recipe.batch))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, samples: int, half_life: float) -> None:
    """Moves the average towards the model by the weight of ``samples`` samples; statistics of norms are copied.

    A ``half_life`` of 0 samples copies the weights too. Frozen weights stay, as they do in the model.
    """
    decay = 0.5 ** (samples / half_life) if half_life else 0.0
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    averaged, current = zip(*[(local(a), local(p.detach())) for a, p in pairs if p.requires_grad], strict=True)
    get_ema_multi_avg_fn(decay)(averaged, current, None)
    for average, value in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(value)


def parts(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of a state by part and name; those of the optimiser by the parameter's name and the kind."""
    optimizer = {
        f"{name}:{kind}": value
        for name, parameter in state.model.named_parameters()
        for kind, value in state.optimizer.state.get(parameter, {}).items()
    }
    return {"model": state.model.state_dict(), "ema": state.ema.state_dict(), "optimizer": optimizer}


def forms(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Returns tensors of the shape and the place of ``parts``, those of the optimiser also before its first step."""
    optimizer: dict[str, Tensor] = {}
    for name, parameter in state.model.named_parameters():
        optimizer |= {
            f"{name}:{kind}": torch.zeros(()) if kind == "step" else parameter
            for kind in kinds(state.optimizer, parameter)
        }
    return parts(state) | {"optimizer": optimizer}


@torch.no_grad()
def put_back(state: TrainState, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Sets the tensors of ``parts`` of a state, this worker's rows of each."""
    for part, module in (("model", state.model), ("ema", state.ema)):
        for name, tensor in module.state_dict().items():
            local(tensor).copy_(saved[part][name])
    state.optimizer.state.clear()  # a state before its first step has no moments, and old ones must not stay
    for name, parameter in state.model.named_parameters():
        kept = kinds(state.optimizer, parameter)
        if f"{name}:{kept[0]}" not in saved["optimizer"]:
            continue
        for kind in kept:
            tensor = saved["optimizer"][f"{name}:{kind}"]
            if kind == "step":
                moment = tensor.to(parameter.device)
            else:
                moment = torch.zeros_like(parameter, requires_grad=False)
                local(moment).copy_(tensor)
            state.optimizer.state[parameter][kind] = moment


def share(state: TrainState, group: ProcessGroup) -> None:
    """Gives all workers, which hold the same tensors, the state that rank 0 has restored."""
    about = (state.samples, state.seconds, state.phase_seconds, state.journal.saved(), [*parts(state)["optimizer"]])
    state.samples, state.seconds, state.phase_seconds, journal, moments = group.collect([about])[0]
    if not state.samples:  # all begin with the same random weights
        return
    state.journal = MetricsJournal.of(journal)
    if not group.is_rank_0:
        like = forms(state)
        put_back(state, like | {"optimizer": {name: like["optimizer"][name] for name in moments}})
    held = parts(state)  # in one order on all workers: each broadcast has to meet its like
    group.broadcast(held[part][name] for part in held for name in sorted(held[part]))
