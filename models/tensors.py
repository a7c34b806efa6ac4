"""Writes tensors as safetensors files."""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


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
