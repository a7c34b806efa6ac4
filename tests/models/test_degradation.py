import io
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from models.degradation.blur import corruption_blur, gaussian_kernels, mirrored
from models.degradation.bsr import FULL, LIGHT, STEPS, Strength, _noise, _orders, bsr, bsr_mild, jpeg
from models.pixels import from_uint8, psnr, resize, to_uint8
from models.random_streams import RandomStreams


def picture(rows: int, height: int, width: int, detail: float = 0.05) -> Tensor:
    """Smooth shapes with edges and a little texture, uint8 [rows, 3, h, w]."""
    g = torch.Generator().manual_seed(rows * height + width)
    coarse = F.interpolate(torch.rand(rows, 3, 5, 5, generator=g), (height, width), mode="bicubic").clamp(0, 1)
    edges = (F.interpolate(torch.rand(rows, 3, 4, 4, generator=g), (height, width)) > 0.6).float()
    texture = detail * torch.randn(rows, 3, height, width, generator=g)
    return ((0.7 * coarse + 0.3 * edges + texture).clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("shape", [(8, 8), (17, 30)])
def test_the_corruption_blur_equals_torchvision(shape: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(corruption_blur(image), gaussian_blur(image, [3, 3], [0.6, 0.6]), atol=1e-6, rtol=0)


def test_a_kernel_has_the_covariance_that_was_asked_for() -> None:
    angle, variances = torch.tensor([0.0, 0.5, 2.0]), torch.tensor([[4.0, 1.0], [6.0, 2.0], [1.5, 5.0]])
    kernels = gaussian_kernels(25, angle, variances, shift=1.5)
    y, x = torch.meshgrid(torch.arange(25.0) - 12, torch.arange(25.0) - 12, indexing="ij")
    points = torch.stack([x, y]).flatten(1)
    weights = kernels.flatten(1)
    mean = weights @ points.T
    torch.testing.assert_close(mean, torch.full((3, 2), 1.5), atol=1e-3, rtol=0)
    centred = points - mean[:, :, None]
    covariance = torch.einsum("bn,bin,bjn->bij", weights, centred, centred)
    axes = torch.stack([torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], -2)
    torch.testing.assert_close(covariance, axes @ torch.diag_embed(variances) @ axes.transpose(1, 2), atol=0.02, rtol=0)


def test_mirroring_equals_pytorch_where_that_works_and_numpy_beyond() -> None:
    image = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mirrored(image, 4), F.pad(image, (4, 4, 4, 4), mode="reflect"))
    wide = np.pad(image.numpy(), ((0, 0), (0, 0), (12, 12), (12, 12)), mode="reflect")
    assert np.array_equal(mirrored(image, 12).numpy(), wide)
    assert torch.equal(mirrored(image[:, :, :1, :1], 3), image[:, :, :1, :1].expand(1, 3, 7, 7))


def pillow_jpeg(image: Tensor, quality: int) -> Image.Image:
    """uint8 [1, 3, h, w] written and opened by Pillow."""
    file = io.BytesIO()
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return Image.open(file)


def test_jpeg_equals_pillow() -> None:
    for shape, quality in product([(64, 64), (48, 80), (33, 61), (7, 5)], [1, 10, 30, 49, 50, 80, 95, 100]):
        original = picture(1, *shape)
        theirs = torch.from_numpy(np.array(pillow_jpeg(original, quality))).permute(2, 0, 1)[None]
        ours = jpeg((original.float() - 0.4) / 255, torch.tensor([quality]))
        assert torch.equal((ours * 255).round().to(torch.uint8), theirs)


def test_jpeg_takes_a_quality_for_each_row() -> None:
    image = picture(3, 32, 32).float() / 255
    quality = torch.tensor([20, 60, 95])
    together = jpeg(image, quality)
    for row in range(3):
        assert torch.equal(together[[row]], jpeg(image[[row]], quality[[row]]))
    errors = (together - image).square().mean(dim=(1, 2, 3))
    assert errors[0] > errors[1] > errors[2]


def draws(rows: int, first: int = 0) -> RandomStreams:
    return RandomStreams([(seed, 1) for seed in range(first, first + rows)])


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (32, 48), (8, 8), (4, 4)])
def test_bsr_gives_a_quarter_of_the_side_on_8_bit_levels(light: bool, shape: tuple[int, int]) -> None:
    low = bsr(from_uint8(picture(24, *shape)), draws(24), light)
    assert low.shape == (24, 3, shape[0] // 4, shape[1] // 4)
    assert low.dtype == torch.float32
    torch.testing.assert_close(from_uint8(to_uint8(low)), low, atol=1e-6, rtol=0)


def test_a_row_is_degraded_alike_in_any_batch() -> None:
    images = from_uint8(picture(6, 32, 32))
    together = bsr(images, draws(6))
    for row in range(6):
        alone = bsr(images[[row]], draws(1, row))
        # Sums in another order may fall on the other side of a rounding step, which JPEG spreads over a block.
        assert (alone - together[[row]]).abs().mean() < 1e-3
    assert not torch.equal(together, bsr(images, draws(6, first=6)))


def test_bsr_damages_more_than_its_light_form_and_that_more_than_the_mild_end() -> None:
    images = from_uint8(picture(32, 64, 64, detail=0.02))
    clean = resize(images, (16, 16))
    forms = product(((bsr, images), (bsr_mild, clean)), (False, True))
    damaged = (damage(given, draws(32), form) for (damage, given), form in forms)
    full, light, mild, mild_light = (psnr(image, clean).mean() for image in damaged)
    assert 14 < full < light - 2
    assert light < mild < mild_light


def test_colours_are_kept() -> None:
    """Over many rows the degradation has no tint and no shift."""
    images = from_uint8(picture(64, 32, 32, detail=0.0))
    difference = bsr(images, draws(64)) - resize(images, (8, 8))
    assert difference.mean(dim=(0, 2, 3)).abs().max() < 0.02


def test_a_gradient_stays_where_it_is() -> None:
    """No step moves the image: the slope's middle remains in the middle, to a tenth of a small pixel."""
    slope = torch.linspace(-0.8, 0.8, 64).expand(200, 3, 64, 64)
    low = bsr(slope, draws(200), light=True).mean(dim=(0, 1))
    expected = resize(slope[:1], (16, 16))[0, 0]
    per_pixel = 1.6 / 16
    assert (low - expected)[:, 4:12].mean().abs() < 0.1 * per_pixel
    assert (low.T - expected.T)[4:12].mean().abs() < 0.1 * per_pixel


def test_the_steps_come_in_every_order_but_the_fit_is_after_the_shrinking() -> None:
    orders = _orders(RandomStreams([(0, 400)]))
    assert all(sorted(order) == sorted(STEPS) for order in orders)
    assert all(order.index("shrink") < order.index("fit") for order in orders)
    assert {order[0] for order in orders} == set(STEPS) - {"fit"}
    assert {order[-1] for order in orders} == set(STEPS) - {"shrink"}


@pytest.mark.parametrize("strength", [FULL, LIGHT], ids=["full", "light"])
def test_noise_is_grey_coloured_or_correlated_in_the_stated_shares_and_levels(strength: Strength) -> None:
    noise = _noise(RandomStreams([(0, 500)]), (16, 16), strength) * 255
    grey = (noise[:, 0] == noise[:, 1]).flatten(1).all(1)
    assert grey.float().mean().item() == pytest.approx(0.4, abs=0.07)
    std = noise[grey].flatten(1).std(1)
    assert strength.noise[0] * 0.8 < std.min()
    assert std.max() < strength.noise[1] * 1.25
    channels = noise.flatten(2)
    correlation = torch.stack([torch.corrcoef(row)[0, 1] for row in channels[~grey]]).abs()
    assert (correlation > 0.2).float().mean().item() == pytest.approx(0.2 / 0.6, abs=0.15)
