"""Writes tensors as safetensors files, and builds no model that is larger than its file."""

import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

MOST_TENSORS = 10_000  # of a model; the largest CLIP that open_clip knows has under 2,000
REPLACED_TENSORS, REPLACED_NUMBERS = 4096, 64  # that any model may have, and times the numbers of its file


@contextmanager
def shapes_only(weights: Path, sizes: Sequence[int] | None = None) -> Iterator[None]:
    """Builds models inside without numbers, on the meta device, as long as they fit their weights.

    A configuration may come from anybody: it takes neither memory nor time beyond what the weights hold.

    Args:
        weights: A safetensors file, or the folder of several.
        sizes: Numbers in each tensor; by default those of the file.

    Raises:
        ValueError: when a model has many times as many tensors or numbers as the weights.
        SafetensorError: when the file is damaged.
    """
    if sizes is None:
        with safe_open(weights, "pt") as file:
            sizes = [prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 - no mapping
    # Networks may tie layers or replace them while they are built, one of the user's own all that it inherits.
    tensors, numbers = min(max(2 * len(sizes), REPLACED_TENSORS), MOST_TENSORS), REPLACED_NUMBERS * sum(sizes)
    builder = threading.get_ident()
    larger = (
        f"{weights} holds {len(sizes):,} tensors of {sum(sizes):,} numbers, and the configuration beside it describes "
        "a larger model: fetch both again"
    )

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, numbers
        if parameter is None or threading.get_ident() != builder:  # another thread builds something else
            return
        tensors, numbers = tensors - 1, numbers - parameter.numel()
        if tensors < 0 or numbers < 0:
            raise ValueError(larger)

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            yield
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():  # as torch says of more numbers than it can count
            raise
        raise ValueError(larger) from error
    finally:
        hook.remove()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes contiguous tensors that share no memory. Raises OSError, as for any other file, where the disk is full."""
    path.touch()
    mode = path.stat().st_mode  # which files have here; safetensors' own are for nobody but their owner
    try:
        save_file(dict(tensors), path, metadata)
        path.chmod(stat.S_IMODE(mode))
    except SafetensorError as e:
        number = re.search(r"\(os error (\d+)\)", str(e))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from e
