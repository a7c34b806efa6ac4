"""The device that a process computes on, and what is said where its memory is short."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.errors import UserError

# Of PyTorch on a CPU, and of CUDA, cuBLAS, cuDNN and NCCL. cuDNN without room for any of its ways finds no "engine".
LACKING = re.compile(
    r"can't allocate memory|out of memory|ALLOC_FAILED|unable to find an engine|CU(BLAS|DNN)_STATUS_NOT_INITIALIZED",
    re.IGNORECASE,
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def choose_device(name: str) -> torch.device:
    """Returns the device of a name as torch writes it; "auto" is the first GPU, or the CPU where torch can use none.

    Convolutions in fp32 are fp32 in this process from then on, not TF32 as a GPU's are by default: those at full
    resolution are there to keep the least noise of x_t.

    Raises UserError for a name that torch does not know, and for a GPU that it cannot use.
    """
    there = torch.cuda.is_available()
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name}: unknown; use auto, cpu or cuda") from None
    if device.type == "cuda" and not there:
        raise UserError(
            f"device {name}: torch finds no GPU here; use auto or cpu, or install a driver and torch for CUDA"
        )
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"device {name}: GPUs are numbered from 0, and torch finds {count} here; name another")
    return device


def keep_freed_memory() -> None:
    """Lets glibc keep what this process frees for its next tensors; does nothing elsewhere than on Linux with glibc.

    By default glibc returns a step's tensors to the kernel and asks for them again, page fault by page fault, which is
    slow on virtual machines.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


class OutOfMemory(Exception):
    """Says that something did not fit into memory: its name, and the number of its rows if fewer might."""


@contextmanager
def memory_for(what: str, rows: int = 0) -> Iterator[None]:
    """Raises OutOfMemory for each error by which PyTorch reports a lack of memory."""
    try:
        yield
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError) or LACKING.search(str(e)):
            raise OutOfMemory(what, rows) from e
        raise
