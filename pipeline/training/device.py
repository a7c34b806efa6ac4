"""The device and the precision that a process computes with."""

from __future__ import annotations

import torch

from pipeline.errors import UserError


def choose_device(name: str) -> torch.device:
    """Returns the device of a name as torch writes it; "auto" is the first GPU, or the CPU where torch can use none.

    Raises UserError for a name that torch does not know, and for a GPU that it cannot use.
    """
    there = torch.cuda.is_available()
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


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether a device computes in bf16 itself; emulation is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def computes_in(device: torch.device, precision: str) -> str:
    """Returns the precision that a device computes in: "bf16" becomes "fp32" where the device lacks bf16."""
    return precision if has_bfloat16(device) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context of every forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in(device, precision) == "bf16")
