"""The precision of forward passes."""

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether a device computes in bf16 natively; emulation is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def computes_in(device: torch.device, precision: str) -> str:
    """Returns the precision that a device computes in: "bf16" becomes "fp32" where the device lacks bf16."""
    return precision if has_bfloat16(device) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context of every forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in(device, precision) == "bf16")
