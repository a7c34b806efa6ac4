"""A part of an image, drawn again."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.diffusion.process import Prediction
from models.diffusion.schedules import make_schedule, strided_grid
from models.inpainting import RESAMPLINGS, KnownRegion, repaint
from models.random_streams import RandomStreams
from models.view import view
from tests.models.small_models import make

SIDE = 256


@pytest.fixture(scope="module")
def known() -> KnownRegion:
    """Noise, of which the left three quarters are kept."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    mask = np.full((SIDE, SIDE, 3), 255, np.uint8)
    mask[:, 192:] = 0
    return KnownRegion(Image.fromarray(pixels), Image.fromarray(mask))


def test_what_is_kept_is_the_image_at_every_size_and_the_rest_is_drawn(known: KnownRegion) -> None:
    unclip = make()
    made, other = (unclip.generate([caption] * 2, [1, 2], known=known) for caption in ("a red fox", "the sea"))
    assert sorted(made.images) == [16, 64, 256]
    for side, images in made.images.items():
        truth, share = view(known.image, side), side * 3 // 4 - side // 16  # a soft border belongs to what is drawn
        for image in images.numpy():
            assert (np.abs(image[:, :share].astype(int) - truth[:, :share]) <= 1).all()
            assert (image[:, -side // 8 :] != truth[:, -side // 8 :]).mean() > 0.9
        assert (images[0] != images[1]).any()
    assert (made.embedding != other.embedding).any()


def test_what_is_drawn_agrees_with_what_is_kept() -> None:
    """The data are images of one grey, of unknown brightness: what is drawn has to take on the brightness kept."""
    schedule = make_schedule("cosine", 1000)
    known = KnownRegion(Image.new("RGB", (8, 8), (204, 204, 204)), Image.new("RGB", (8, 8), "white"))
    known.mask.paste("black", (4, 0, 8, 8))

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        """The best guess for brightnesses that are normal around 0: the mean of all pixels, shrunk."""
        level = schedule.at(t)[:, None, None, None].float()
        signal = level * x[0].numel() / (level * x[0].numel() + 1 - level)
        x0 = (x.mean((1, 2, 3), keepdim=True) / level.sqrt() * signal).expand_as(x)
        return Prediction(x0, (x - level.sqrt() * x0) / (1 - level).sqrt())

    rng = RandomStreams([(seed, 1) for seed in range(16)])
    grid = strided_grid(1000, 50)
    made = repaint(denoise, rng.normal("x_T", 3, 8, 8), known, grid, schedule, rng, True)
    drawn = made[:, :, :, 4:]
    assert made[:, :, :, :4].sub(0.6).abs().max() < 1e-6
    assert drawn.mean((1, 2, 3)).sub(0.6).abs().max() < 0.15


def test_a_step_is_taken_again_from_the_noise_of_its_level() -> None:
    """The data are one white image: x at level a is sqrt(a) in the mean, with variance 1 - a, whenever it is seen."""
    schedule, seen = make_schedule("cosine", 1000), []

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        level = schedule.at(t)[:, None, None, None].float()
        seen.append((float(x.mean()), float(x.var()), float(level[0])))
        return Prediction(torch.ones_like(x), (x - level.sqrt()) / (1 - level).sqrt())

    nothing = KnownRegion(Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "black"))
    rng = RandomStreams([(seed, 1) for seed in range(8)])
    repaint(denoise, rng.normal("x_T", 3, 64, 64), nothing, strided_grid(1000, 20), schedule, rng, True)
    assert len(seen) == 19 * RESAMPLINGS + 1
    for mean, variance, level in seen:
        assert mean == pytest.approx(level**0.5, abs=0.02)
        assert variance == pytest.approx(1 - level, abs=0.02)
