"""The sinusoidal timestep embedding."""

from math import log

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Returns fp32 [b, width] of timesteps [b], whole or not: cosines, then sines, of periods 2 pi to 20,000 pi.

    Cosines come first, as in guided diffusion; an odd last column is zero.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-log(10000) / half))
    angles = t.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return torch.nn.functional.pad(embedding, (0, width % 2))
