"""Starts a training from existing weights. A file is identified by its content and stored as a blob."""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.parse import ContentFile
from pipeline.training.task import Finishes, Task

SHOWN_NAMES = 3  # of a kind, in a message


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
