"""The device that a process computes on."""

from __future__ import annotations

import torch

from pipeline.errors import UserError


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
    return device
