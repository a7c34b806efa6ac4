"""Safetensors files: written like any other file, and models built from them within the size of the file."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

MOST_TENSORS = 10_000  # of a model; the largest CLIP that open_clip knows has under 2,000
# A model may register tensors that it then ties or replaces: this many, and this many times the numbers of its file.
REPLACED_TENSORS, REPLACED_NUMBERS = 4096, 64


@contextmanager
def shapes_only(weights: Path, sizes: Sequence[int] | None = None) -> Iterator[None]:
    """Builds models inside on the meta device, without memory, and checks them against the size of their weights.

    A configuration may come from a stranger. So it takes no more memory or time than the weights justify.

    Args:
        weights: A safetensors file, or the folder of several.
        sizes: Number of elements of each tensor; by default those of the file.

    Raises:
        ValueError: when a model has many times as many tensors or numbers as the weights.
        SafetensorError: when the file is damaged.
    """
    if sizes is None:
        with safe_open(weights, "pt") as file:
            sizes = [prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 - no mapping
    tensors, numbers = min(max(2 * len(sizes), REPLACED_TENSORS), MOST_TENSORS), REPLACED_NUMBERS * sum(sizes)
    builder = threading.get_ident()
    larger = (
        f"{weights} holds {len(sizes):,} tensors of {sum(sizes):,} numbers, and the configuration beside it describes "
        "a larger model: fetch both again"
    )

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, numbers
        if parameter is None or threading.get_ident() != builder:  # the hook is global, and other threads build, too
            return
        tensors, numbers = tensors - 1, numbers - parameter.numel()
        if tensors < 0 or numbers < 0:
            raise ValueError(larger)

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            yield
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():  # torch's error for sizes beyond 64 bits
            raise
        raise ValueError(larger) from error
    finally:
        hook.remove()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes contiguous tensors that share no memory. Raises OSError, as for any other file, where the disk is full."""
    # safetensors writes files that only their owner may read. The umask decides here, as for any other file.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata)
        path.chmod(stat.S_IMODE(mode))
    except SafetensorError as e:
        # Rust's I/O errors come as text.
        number = re.search(r"\(os error (\d+)\)", str(e))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from e


def save_half(source: Path, target: Path) -> None:
    """Writes a safetensors file again with its fp32 matrices in fp16, which take half the bytes.

    Vectors stay in fp32: they are few bytes, and constants of a model are among them. So does what fp16 cannot hold.
    """
    tensors = load_file(source)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32 and tensor.ndim > 1 and (half := tensor.half()).isfinite().all():
            tensors[name] = half
    save_tensors(tensors, target)
