"""Noise schedules and sampling grids.

Timestep t runs from 0 (least noise) to T - 1 (almost only noise). A grid is a descending int64 tensor of the timesteps
that a sampler visits; after its last one comes the image itself, written as timestep -1.
"""

from dataclasses import dataclass, field
from functools import cache
from math import pi

import torch
from torch import Tensor

FEW = 15
"""Fewer steps than this end before timestep 0; with more it makes no difference to networks that predict noise."""
NOISIEST = -3.0
"""Half the log signal-to-noise ratio below which a prediction hardly changes: the signal has 5% of the amplitude."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """``alpha_bar``, float64 [T], falling: the share of the data's variance that is left at timestep t."""

    alpha_bar: Tensor
    # A copy a device, since a copy at every step would synchronise a GPU.
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def steps(self) -> int:
        """Returns T, the number of timesteps."""
        return len(self.alpha_bar)

    def at(self, t: Tensor) -> Tensor:
        """Returns alpha_bar of int64 timesteps, float64, shaped like ``t``; timestep -1 is the data, where it is 1."""
        if t.device not in self._copies:
            self._copies[t.device] = self.alpha_bar.to(t.device)
        values = self._copies[t.device][t.clamp(min=0)]
        return torch.where(t < 0, 1.0, values)


@cache
def make_schedule(name: str, steps: int) -> Schedule:
    """Returns the schedule called "cosine" or "linear" with T = ``steps``. Raises ValueError on another name.

    Cosine: Nichol & Dhariwal 2021, equation 17. Linear: Ho et al. 2020, betas from 1e-4 to 0.02 at T = 1000, scaled
    by 1000 / T. Both keep beta at or below 0.999.
    """
    if name == "cosine":
        edges = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        level = torch.cos((edges + 0.008) / 1.008 * pi / 2) ** 2
        beta = 1 - level[1:] / level[:-1]
    elif name == "linear":
        beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64, device="cpu") * 1000 / steps
    else:
        raise ValueError(f"schedule is {name!r}: use 'cosine' or 'linear'")
    return Schedule(torch.cumprod(1 - beta.clamp(max=0.999), dim=0))


def _check_count(count: int, steps: int) -> None:
    if not 2 <= count <= steps:
        raise ValueError(f"cannot take {count} sampling steps out of {steps}: use 2 to {steps}")


def strided_grid(steps: int, count: int) -> Tensor:
    """Returns ``count`` of T = ``steps`` timesteps, evenly spread from T - 1 down to 0, rounded to the nearest.

    Raises ValueError unless 2 <= count <= steps.
    """
    _check_count(count, steps)
    ascending = torch.arange(count, dtype=torch.float64) * ((steps - 1) / (count - 1))
    return ascending.round().long().flip(0)


def trailing_grid(steps: int, count: int) -> Tensor:
    """Returns ``count`` of T = ``steps`` timesteps, each the last of an equal part of the schedule, from T - 1 down.

    The last step then leads to the data from where there is still noise to take away, instead of from timestep 0
    (Lin et al. 2023, "Common diffusion noise schedules and sample steps are flawed", section 3.3). Raises ValueError
    unless 2 <= count <= steps.
    """
    _check_count(count, steps)
    return (steps - torch.arange(count, dtype=torch.float64) * (steps / count)).round().long() - 1


def log_snr_grid(schedule: Schedule, count: int) -> Tensor:
    """Returns ``count`` timesteps from T - 1 down to 0, after the first evenly spread in the log signal-to-noise ratio.

    DPM-Solver++ is derived in that variable. The first step leads to ``NOISIEST`` at once: before it x_t is almost only
    noise, and a cosine schedule would spend a third of the grid there. Where timesteps are too coarse for even steps,
    as near the data, every one is taken. Raises ValueError unless 2 <= count <= T.
    """
    steps = schedule.steps
    _check_count(count, steps)
    half_log_snr = torch.logit(schedule.alpha_bar) / 2
    start, end = half_log_snr[0], half_log_snr[-1].clamp(min=NOISIEST)
    even = start + (end - start) * torch.arange(count - 1, dtype=torch.float64) / max(1, count - 2)
    nearest = (half_log_snr - even[:, None]).abs().argmin(1)
    ascending = torch.cat([nearest, torch.tensor([steps - 1])])
    # Nearest timesteps may coincide: the running maximum makes them rise by 1 or more, and the minimum leaves room for
    # those still to come.
    number = torch.arange(count)
    apart = (ascending - number).cummax(0).values + number
    return torch.minimum(apart, steps - count + number).flip(0)


def fast27_grid(steps: int) -> Tensor:
    """Returns GLIDE's 27 uneven timesteps: 10, 10, 3, 2 and 2 in five equal sections from the least noise to the most.

    The noisiest is T - 3 instead of T - 1, which makes fewer artefacts with DDIM. Raises ValueError if T is below 50.
    """
    if steps < 50:
        raise ValueError(f"the 27 uneven sampling steps need 50 or more diffusion steps, not {steps}")
    counts = (10, 10, 3, 2, 2)
    size, extra = divmod(steps, 5)
    bounds = [size * section + min(section, extra) for section in range(6)]  # the first sections take the remainder
    sections = [
        torch.linspace(start, stop - 1, count, dtype=torch.float64).round().long()
        for start, stop, count in zip(bounds, bounds[1:], counts, strict=False)
    ]
    grid = torch.cat(sections).flip(0)
    grid[0] = steps - 3
    return grid
