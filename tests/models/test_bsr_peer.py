"""The pieces of BSR that have one right answer, against bsrgan's own. The rest is chance."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import ndimage

from benchmarks.bsr import degrade, load_peer
from models.degradation import bsr as module
from models.degradation.blur import blur, gaussian_kernels
from models.degradation.bsr import FULL, LIGHT, Strength, _kernels, _shrinker
from models.random_streams import RandomStreams


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    return sys.modules[load_peer().__module__]


def test_turned_ellipses_equal_bsrgans(peer: ModuleType) -> None:
    angle = torch.tensor([0.3, 1.2, 2.9], dtype=torch.float64)
    variances = torch.tensor([[4.0, 1.0], [0.5, 6.0], [2.0, 3.0]], dtype=torch.float64)
    ours = gaussian_kernels(25, angle, variances)
    for kernel, theta, (first, second) in zip(ours, angle.tolist(), variances.tolist(), strict=True):
        np.testing.assert_allclose(kernel, peer.anisotropic_Gaussian(25, theta, first, second), atol=1e-7)


def test_circles_equal_bsrgans(peer: ModuleType) -> None:
    for sigma in (0.3, 1.0, 2.4):
        ours = gaussian_kernels(25, torch.zeros(1), torch.full((1, 2), sigma**2))
        np.testing.assert_allclose(ours[0], peer.fspecial_gaussian(25, sigma), atol=1e-6)


def test_a_blur_equals_scipys_with_mirrored_edges(peer: ModuleType) -> None:
    """As bsrgan calls it; symmetric kernels, so convolution and correlation agree."""
    image = torch.rand(2, 3, 20, 31, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernels = gaussian_kernels(25, torch.tensor([0.4, 2.0]), torch.tensor([[3.0, 1.0], [2.0, 8.0]])).double()
    ours = blur(image, kernels)
    for row in range(2):
        for channel in range(3):
            theirs = ndimage.convolve(image[row, channel].numpy(), kernels[row].numpy(), mode="mirror")
            np.testing.assert_allclose(ours[row, channel], theirs, atol=1e-12)


ROWS = 2000
PARTS = np.linspace(0.1, 0.9, 9)


@pytest.fixture(scope="module")
def drawn(peer: ModuleType) -> dict[str, np.ndarray]:
    """What bsrgan draws while it degrades small images: eigenvalues and sides of ellipses, deviations and sides of
    circles, and deviations of the kernels for shrinking, with the share of images that are shrunk by one."""
    found: dict[str, list[float]] = {
        name: [] for name in ("ellipse", "ellipse side", "circle", "circle side", "shrink")
    }

    def ellipse(ksize: int, theta: float, l1: float, l2: float) -> np.ndarray:
        found["ellipse"] += [l1, l2]
        found["ellipse side"].append(ksize)
        return np.ones((1, 1))

    def circle(kind: str, side: int, sigma: float) -> np.ndarray:
        found["circle"].append(sigma)
        found["circle side"].append(side)
        return np.ones((1, 1))

    def shift(kernel: np.ndarray, scale: int) -> np.ndarray:
        found["shrink"].append(found["circle"].pop())
        found["circle side"].pop()
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        for name, fake in (("anisotropic_Gaussian", ellipse), ("fspecial", circle), ("shift_pixel", shift)):
            patch.setattr(peer, name, fake)
        degrade(np.full((ROWS, 8, 8, 3), 128, np.uint8), seed=0)
    return {name: np.array(values) for name, values in found.items()} | {"share": np.array(len(found["shrink"]) / ROWS)}


def drawn_here(strength: Strength) -> dict[str, np.ndarray]:
    """The same of ours."""
    rng, variances = RandomStreams([(0, ROWS)]), []
    scale = torch.where(rng.uniform("halve") < 0.25, 2.0, 4.0)

    def record(side: int, angle: torch.Tensor, drawn: torch.Tensor, shift: object = 0.0) -> torch.Tensor:
        variances.append(drawn)
        return gaussian_kernels(side, angle, drawn, shift)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "gaussian_kernels", record)
        sides = np.array([len(kernel) for kernel in _kernels(rng, "blur", scale, strength)])
        shrink = _shrinker(rng, scale, strength)
        blurred: list[int] = []
        patch.setattr(module, "blur", lambda x, kernel, stride: blurred.append(stride) or x)
        shrink(torch.zeros(ROWS, 3, 8, 8), list(range(ROWS)))
    first, second = variances[0].unbind(1)
    circle = (first == second).numpy()
    return {
        "ellipse": variances[0][~circle].flatten().numpy(),
        "ellipse side": sides[~circle],
        "circle": first[circle].sqrt().numpy(),
        "circle side": sides[circle],
        "shrink": variances[1][:, 0].sqrt().numpy(),
        "share": np.array(len(blurred) / ROWS),
    }


def test_blurs_and_kernels_for_shrinking_are_drawn_as_bsrgan_draws_them(drawn: dict[str, np.ndarray]) -> None:
    """Quantiles of 2,000 draws, within four times their error."""
    ours = drawn_here(FULL)
    assert abs(float(ours["share"]) - float(drawn["share"])) < 0.06
    assert abs(len(ours["circle"]) / ROWS - 0.5) < 0.05
    for name in ("ellipse side", "circle side"):
        assert set(ours[name]) == set(drawn[name])
        assert abs(ours[name].mean() - drawn[name].mean()) < 1.0
    for name in ("ellipse", "circle", "shrink"):
        expected, found = np.quantile(drawn[name], PARTS), np.quantile(ours[name], PARTS)
        assert np.abs(found - expected).max() < 0.11 * np.ptp(drawn[name]), name


def test_the_light_form_is_latent_diffusions() -> None:
    """Its bsrgan_light.py: blurs a quarter as wide, ellipses of 5 to 14 pixels (here of the odd sides), circles of 5 to
    7, four times in five shrunk by resizing."""
    full, light = drawn_here(FULL), drawn_here(LIGHT)
    assert set(light["ellipse side"]) == {5, 7, 9, 11, 13}
    assert set(light["circle side"]) == {5, 7}
    assert abs(float(light["share"]) - 0.2) < 0.04
    np.testing.assert_allclose(light["ellipse"], full["ellipse"] / 4, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(light["circle"], full["circle"] / 4, rtol=1e-4, atol=1e-2)
