import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.degradation.blur import corruption_blur
from models.diffusion.process import error_weight
from models.diffusion.samplers import ddim
from models.diffusion.schedules import make_schedule, strided_grid
from models.image_configs import UpsamplerConfig
from models.pixels import from_uint8, resize, to_uint8
from models.random_streams import RandomStreams
from models.upsampler import Upsampler, corrupted_low, random_crop, sampling_low, upsampler_denoise, upsampler_loss

CONFIG = UpsamplerConfig(
    low_size=16, image_size=64, channels=16, depth=1, multipliers=(1, 2), dropout=0.0, prediction="v"
)  # fmt: skip


def stripes(rows: int, side: int = 64) -> Tensor:
    """Slanted stripes of different widths and colours, uint8 [rows, 3, side, side]."""
    g = torch.Generator().manual_seed(rows)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    slope, period = torch.rand(2, rows, generator=g) * 2 - 1, torch.randint(12, 24, (rows,), generator=g)
    waves = torch.sin((x + slope[0][:, None, None] * y) * 2 * torch.pi / period[:, None, None])
    colours = torch.rand(2, rows, 3, 1, 1, generator=g)
    return to_uint8((torch.where(waves[:, None] > 0, colours[0], colours[1])) * 2 - 1)


def test_crops_are_aligned_pieces_of_their_own_row() -> None:
    image = torch.arange(6 * 3 * 64 * 64).view(6, 3, 64, 64)
    crops = random_crop(image, 16, 4, RandomStreams([(3, 6)]))
    corners = set()
    for row in range(6):
        offset = int(crops[row, 0, 0, 0]) - row * 3 * 64 * 64
        top, left = divmod(offset, 64)
        assert torch.equal(crops[row], image[row, :, top : top + 16, left : left + 16])
        assert top % 4 == left % 4 == 0
        corners.add((top, left))
    assert len(corners) > 3


def test_every_aligned_crop_is_drawn() -> None:
    places = random_crop(torch.arange(64).view(1, 1, 8, 8).expand(300, 1, 8, 8), 4, 2, RandomStreams([(0, 300)]))[
        :, 0, 0, 0
    ]
    assert set(places.tolist()) == {top * 8 + left for top in (0, 2, 4) for left in (0, 2, 4)}


@pytest.mark.parametrize("corruption", ["blur", "bsr", "bsr_light"])
def test_the_condition_is_small_and_damaged(corruption: str) -> None:
    config = dataclasses.replace(CONFIG, corruption=corruption)
    crop = from_uint8(stripes(5))
    low = corrupted_low(config, crop, RandomStreams([(0, 5)]))
    clean = resize(crop, (16, 16))
    assert low.shape == clean.shape
    assert low.abs().max() <= 1
    assert 0.01 < (low - clean).abs().mean() < 0.5
    if corruption == "blur":
        torch.testing.assert_close(low, corruption_blur(clean))


@pytest.mark.parametrize("corruption", ["blur", "bsr"])
def test_corruption_is_fp32_under_autocast(corruption: str) -> None:
    config, crop = dataclasses.replace(CONFIG, corruption=corruption), from_uint8(stripes(3))
    low = resize(crop, (16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair = corrupted_low(config, crop, RandomStreams([(0, 3)])), sampling_low(config, low, RandomStreams([(0, 3)]))
    assert torch.equal(pair[0], corrupted_low(config, crop, RandomStreams([(0, 3)])))
    assert torch.equal(pair[1], sampling_low(config, low, RandomStreams([(0, 3)])))


def test_sampling_corrupts_the_condition_mildly_or_not_at_all() -> None:
    low = resize(from_uint8(stripes(4, 16)), (64, 64))
    rng = RandomStreams([(0, 4)])
    torch.testing.assert_close(sampling_low(CONFIG, low, rng), corruption_blur(low))
    for corruption in ("bsr", "bsr_light"):
        config = dataclasses.replace(CONFIG, corruption=corruption)
        assert 0 < (sampling_low(config, low, rng) - low).abs().mean() < 0.03
        assert sampling_low(dataclasses.replace(config, corrupt_at_inference=False), low, rng) is low


def test_an_upsampler_that_predicts_the_image_begins_with_the_enlarged_one() -> None:
    torch.manual_seed(0)
    model = Upsampler(dataclasses.replace(CONFIG, prediction="x0"))
    low, noise, schedule = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 16, 16), make_schedule("cosine", 1000)
    samples = ddim(upsampler_denoise(model, low), noise, strided_grid(1000, 5), schedule)
    torch.testing.assert_close(samples, resize(low, (16, 16)).clamp(-1, 1), atol=1e-5, rtol=0)
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    patches = torch.cat([noise, resize(low, (16, 16))], dim=1)
    t = torch.tensor([3, 700])
    with torch.no_grad():
        expected = resize(low, (16, 16)) + model.unet(patches, t)
        torch.testing.assert_close(model(noise, t, low), expected, atol=1e-5, rtol=0)


def test_max_snr_weighs_the_squared_error() -> None:
    torch.manual_seed(0)
    model, batch, rng = Upsampler(CONFIG).eval(), {"image": stripes(8)}, RandomStreams([(0, 8)])
    with torch.no_grad():
        plain = upsampler_loss(model, batch, rng).total
        model.config = dataclasses.replace(CONFIG, max_snr=5.0)
        bounded = upsampler_loss(model, batch, rng).total
    weight = error_weight("v", make_schedule("cosine", 1000).at(rng.integers("t", 1000)), 5.0).float()
    assert (weight < 1).any()
    torch.testing.assert_close(bounded, weight * plain)


def test_far_pixels_do_not_matter_so_a_crop_is_as_good_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only group normalisation, which averages over the image, sees further than the convolutions do."""
    torch.manual_seed(0)
    model = Upsampler(dataclasses.replace(CONFIG, pixel_channels=5))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr(F, "group_norm", lambda x, groups, weight, bias, eps: x)
    x_t, low, t = torch.randn(1, 3, 128, 128), torch.randn(1, 3, 32, 32).clamp(-1, 1), torch.tensor([300])
    with torch.no_grad():
        whole = model(x_t, t, low)
        part = model(x_t[:, :, :96, :96], t, low[:, :, :24, :24])
    torch.testing.assert_close(part[:, :, :48, :48], whole[:, :, :48, :48], atol=1e-4, rtol=1e-4)


def test_a_correction_of_pixels_starts_as_nothing_and_learns() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, patch=2, pixel_channels=5)
    model, batch = Upsampler(config), {"image": stripes(2)}
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    plain = Upsampler(dataclasses.replace(config, pixel_channels=0))
    plain.unet.load_state_dict(model.unet.state_dict())
    rng = RandomStreams([(0, 2)])
    loss = upsampler_loss(model, batch, rng).total
    assert torch.equal(loss, upsampler_loss(plain, batch, rng).total)
    loss.sum().backward()
    assert model.pixels is not None
    assert model.pixels.conv_out.weight.grad.any()


def test_a_row_s_loss_does_not_depend_on_the_other_rows() -> None:
    torch.manual_seed(0)
    model, image = Upsampler(CONFIG).eval(), stripes(3)
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    with torch.no_grad():
        together = upsampler_loss(model, {"image": image}, RandomStreams([(5, 1), (6, 1), (7, 1)])).total
        alone = upsampler_loss(model, {"image": image[[1]]}, RandomStreams([(6, 1)])).total
    torch.testing.assert_close(alone, together[[1]], atol=1e-5, rtol=1e-4)


def test_a_second_network_takes_timestep_0_alone_and_training_reaches_it() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, last_unet=True, scale_shift=False)
    model = Upsampler(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x_t, t, low = torch.randn(3, 3, 16, 16), torch.tensor([700, 0, 1]), torch.randn(3, 3, 4, 4).clamp(-1, 1)
    both = torch.cat([x_t, resize(low, (16, 16))], dim=1)
    with torch.no_grad():
        expected = torch.where((t == 0).view(3, 1, 1, 1), model.last_unet(both, t), model.unet(both, t))
        assert torch.equal(model.train()(x_t, t, low), expected)
    for step in (torch.tensor([700, 5, 1]), t):
        model.train().zero_grad()
        model(x_t, step, low).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert any(parameter.grad.any() for parameter in model.last_unet.parameters()) == (0 in step)
