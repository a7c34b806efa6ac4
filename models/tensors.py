"""Tensors as safetensors files: on a disk, or as buffers that share their memory."""

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

# The format's names, in the order in which safetensors places tensors in a file: then all are aligned.
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors that share no memory. Raises OSError, as for any other file, where the disk is full."""
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


def tensors_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[memoryview]:
    """The bytes of such a file without a copy: a header, and the memory of each tensor. Takes contiguous tensors on
    the CPU. Raises KeyError for a dtype that is not in DTYPES."""
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    names = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return [memoryview(start), *(tensors[name].view(-1).view(torch.uint8).numpy().data for name in names)]
