"""Classifier-free guidance (Ho & Salimans 2022): (1 + w) conditional - w unconditional.

The literature's guidance scale s is 1 + w: weight 0 is the conditional prediction alone. The same combination holds
for eps, v and x0, because for one x_t they are linear in each other.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def guidance_rows(rows: int, weight: float, device: torch.device) -> Tensor:
    """Returns which rows of a guided forward pass keep their condition: bool [rows], or [2 rows] if there is guidance.

    With guidance the second half is the empty condition.
    """
    keep = torch.ones(rows, dtype=torch.bool, device=device)
    return keep if weight == 0 else torch.cat([keep, ~keep])


def guided_output(network: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor, weight: float) -> Tensor:
    """Returns the guided output of ``network`` for x_t [b, c, ...] and t [b], both branches in one forward pass.

    ``network`` holds conditions for the rows of ``guidance_rows``. Channels after the first c, the learned variance,
    come from the conditional branch alone.
    """
    if weight == 0:
        return network(x_t, t)
    conditional, empty = network(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)
    channels = x_t.shape[1]
    mean = (1 + weight) * conditional[:, :channels] - weight * empty[:, :channels]
    return torch.cat([mean, conditional[:, channels:]], dim=1)
