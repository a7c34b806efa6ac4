"""Data of which everything is known: the best prediction at any noise, the map from noise to data, the moments."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.diffusion.process import Prediction, predict
from models.diffusion.schedules import Schedule


@dataclass(frozen=True)
class Gaussian:
    """Normal data with ``mean`` [d] and ``covariance`` [d, d], float64, under a noise schedule.

    ``fraction`` is what its predictions say of the learned variance; None says nothing.
    """

    schedule: Schedule
    mean: Tensor
    covariance: Tensor
    fraction: float | None = None

    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        """The best prediction, the mean of x0 given x_t [b, d]."""
        level = self.schedule.at(t)
        signal = level.sqrt()[:, None]
        gain = signal[..., None] * self.covariance @ torch.linalg.inv(self.covariance_at(level))
        x0 = self.mean + ((x_t - signal * self.mean)[:, None] @ gain.mT)[:, 0]
        fraction = None if self.fraction is None else torch.full_like(x_t, self.fraction)
        return predict("x0", x0, x_t, level)._replace(variance_fraction=fraction)

    def covariance_at(self, level: Tensor) -> Tensor:
        """The covariance of x_t, [..., d, d]."""
        share = level[..., None, None]
        return share * self.covariance + (1 - share) * torch.eye(len(self.mean), dtype=torch.float64)

    def mean_at(self, level: Tensor) -> Tensor:
        """The mean of x_t, [..., d]."""
        return level.sqrt()[..., None] * self.mean

    def flow(self, x: Tensor, level: Tensor, to: Tensor) -> Tensor:
        """Where the probability-flow ODE takes x [b, d] from one level to another: the same number of deviations."""
        scale = _root(self.covariance_at(to)) @ torch.linalg.inv(_root(self.covariance_at(level)))
        return self.mean_at(to) + (x - self.mean_at(level)) @ scale.mT

    def gamma(self) -> Tensor:
        """E ||eps||^2 / d at every timestep, where eps is sqrt(1 - a) covariance^-1 (x_t - mean), [T]."""
        level = self.schedule.alpha_bar
        precision = torch.linalg.inv(self.covariance_at(level))
        return (1 - level) * precision.diagonal(dim1=1, dim2=2).mean(1)

    def start(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [d] and a root of the covariance [d, d] of x at the first timestep of the grid."""
        level = self.schedule.at(grid[0])
        return self.mean_at(level), _root(self.covariance_at(level))


@dataclass(frozen=True)
class Mixture:
    """Equally many data around each of ``means`` [k, d], normal with ``stds`` [k] in every direction."""

    schedule: Schedule
    means: Tensor
    stds: Tensor

    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        """The best prediction: that of each component, weighted by its probability given x_t [b, d]."""
        level = self.schedule.at(t)[:, None, None]
        variance = level * self.stds[:, None] ** 2 + 1 - level
        distance = x_t[:, None] - level.sqrt() * self.means
        log_density = -(distance**2 / variance + variance.log()).sum(-1) / 2
        x0 = self.means + level.sqrt() * self.stds[:, None] ** 2 / variance * distance
        return predict("x0", (log_density.softmax(1)[..., None] * x0).sum(1), x_t, self.schedule.at(t))


def anisotropic(schedule: Schedule, fraction: float | None = None) -> Gaussian:
    """A Gaussian of three dimensions away from zero, its axes at an angle, with deviations of 0.9, 0.5 and 0.25."""
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    covariance = turn @ torch.diag(torch.tensor([0.9, 0.5, 0.25], dtype=torch.float64) ** 2) @ turn.T
    return Gaussian(schedule, torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64), covariance, fraction)


def uneven(schedule: Schedule, count: int) -> Tensor:
    """A grid whose steps are one third and two thirds of a pair in turn, from the data."""
    pair = 2 * (schedule.steps - 1) // count
    start = torch.arange(0, schedule.steps, pair)
    return torch.cat([start, start[:-1] + pair // 3]).sort().values.flip(0)


def even_log_snr(steps: int, noisiest: float = -4.0, clearest: float = 8.0) -> Schedule:
    """A schedule that is even in half the log signal-to-noise ratio, and ends so near the data that it may count so."""
    return Schedule(torch.sigmoid(2 * torch.linspace(clearest, noisiest, steps, dtype=torch.float64)))


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT


def ring(schedule: Schedule) -> Mixture:
    """Eight clusters on a circle."""
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    return Mixture(schedule, torch.stack([angle.cos(), angle.sin()], dim=1), torch.full((8,), 0.15).double())
