"""The pieces of BSR that have one right answer, against bsrgan's own. The rest is chance."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import ndimage

from benchmarks.bsr import load_peer
from models.degradation.blur import blur, gaussian_kernels, mirrored
from tests.models.mutations import fails_under


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    return sys.modules[load_peer().__module__]


@fails_under(
    (gaussian_kernels, "cos * y - sin * x", "cos * y + sin * x"),
    (gaussian_kernels, "across**2 / second", "across**2 / first"),
)
def test_turned_ellipses_equal_bsrgans(peer: ModuleType) -> None:
    angle = torch.tensor([0.3, 1.2, 2.9], dtype=torch.float64)
    variances = torch.tensor([[4.0, 1.0], [0.5, 6.0], [2.0, 3.0]], dtype=torch.float64)
    ours = gaussian_kernels(25, angle, variances)
    for kernel, theta, (first, second) in zip(ours, angle.tolist(), variances.tolist(), strict=True):
        np.testing.assert_allclose(kernel, peer.anisotropic_Gaussian(25, theta, first, second), atol=1e-7)


@fails_under((gaussian_kernels, "(side - 1) / 2", "side / 2"))
def test_circles_equal_bsrgans(peer: ModuleType) -> None:
    for sigma in (0.3, 1.0, 2.4):
        ours = gaussian_kernels(25, torch.zeros(1), torch.full((1, 2), sigma**2))
        np.testing.assert_allclose(ours[0], peer.fspecial_gaussian(25, sigma), atol=1e-6)


@fails_under((mirrored, "last - (last - place).abs()", "place.clamp(0, last)"))
def test_a_blur_equals_scipys_with_mirrored_edges(peer: ModuleType) -> None:
    """As bsrgan calls it; symmetric kernels, so convolution and correlation agree."""
    image = torch.rand(2, 3, 20, 31, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernels = gaussian_kernels(25, torch.tensor([0.4, 2.0]), torch.tensor([[3.0, 1.0], [2.0, 8.0]])).double()
    ours = blur(image, kernels)
    for row in range(2):
        for channel in range(3):
            theirs = ndimage.convolve(image[row, channel].numpy(), kernels[row].numpy(), mode="mirror")
            np.testing.assert_allclose(ours[row, channel], theirs, atol=1e-12)
