"""The structural similarity of pictures (Wang et al. 2004), in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 11  # pixels
SIGMA = 1.5
RANGE = 2.0  # of pictures in [-1, 1]
C1, C2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2


def ssim(image: Tensor, reference: Tensor) -> Tensor:
    """SSIM of pictures in [-1, 1], [b, c, h, w]: fp64 [b], 1 for equal ones.

    A Gaussian window of 11 px and sigma 1.5, only where it lies within the picture, population variances, the mean over
    places and channels. Raises ValueError for a picture smaller than the window.
    """
    if min(image.shape[2:]) < WINDOW:
        raise ValueError(f"a picture of {tuple(image.shape[2:])} px is smaller than the window of {WINDOW}")
    x, y = image.double(), reference.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return (luminance * structure).flatten(1).mean(1)


def _blur(x: Tensor) -> Tensor:
    """Means under the window, [b, c, h - 10, w - 10]."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    for dim in (2, 3):  # slices are added: a convolution in fp64 takes six times as long
        length = x.shape[dim] - WINDOW + 1
        total = torch.zeros_like(x.narrow(dim, 0, length))
        for i, weight in enumerate((weights / weights.sum()).tolist()):
            total.add_(x.narrow(dim, i, length), alpha=weight)
        x = total
    return x
