"""Pixels as the image models see them: fp32 in [-1, 1], and the one resize that training and sampling share."""

import torch
import torch.nn.functional as F
from torch import Tensor


def from_uint8(image: Tensor) -> Tensor:
    """Turns uint8 [b, 3, h, w] to fp32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """Turns values in [-1, 1] to the nearest uint8; those beyond are clamped."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes, antialiased bicubic, [b, 3, h, w] to ``size`` (h, w) if it has another, clamped to [-1, 1], fp32."""
    if image.shape[2:] == size:
        return image.float().clamp(-1, 1)
    resized = F.interpolate(image.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1, 1)
