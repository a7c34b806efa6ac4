"""Tensors written to a safetensors file."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors that share no memory. Raises OSError, as for any other file, where the disk is full."""
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as e:
        number = re.search(r"\(os error (\d+)\)", str(e))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from e
