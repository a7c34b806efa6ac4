"""The structural similarity of pictures (Wang et al. 2004), in fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, WINDOW)
    x = F.conv2d(x, weights, groups=x.shape[1])
    return F.conv2d(x, weights.transpose(2, 3), groups=x.shape[1])
