"""Large images in tiles: covered, averaged without seams, and close to what the whole gives."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.image_configs import UpsamplerConfig
from models.tiling import in_tiles, tile_starts
from models.upsampler import Upsampler, upsampler_denoise


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 40))
def test_tiles_cover_everything_and_overlap(multiple: int, tiles: int, more: int) -> None:
    tile, size = tiles * multiple, (tiles + more) * multiple
    starts = tile_starts(size, tile, multiple)
    assert starts[0] == 0
    assert starts[-1] == size - tile
    assert all(start % multiple == 0 for start in starts)
    assert all(0 < after - before <= tile for before, after in pairwise(starts))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_a_pointwise_network_gives_what_it_gives_of_the_whole() -> None:
    x, condition = _noise(3, 3, 40, 24), _noise(3, 3, 40, 24).flip(2)
    together = in_tiles(lambda a, b: a * 2 + b, x, condition, tile=16, multiple=4)
    torch.testing.assert_close(together, x * 2 + condition)


def test_tiles_that_disagree_meet_without_a_jump() -> None:
    """Each tile answers with another constant; no two neighbouring pixels may differ by more than a ramp's step."""
    answers = iter(range(100))
    x = _noise(1, 3, 80, 80)
    out = in_tiles(lambda a, _: torch.full_like(a, float(next(answers) % 2)), x, x, tile=32, multiple=4)
    step = max(float(out.diff(dim=d).abs().max()) for d in (2, 3))
    assert out.max() - out.min() == 1
    assert step < 0.2  # a ramp of 8 pixels; side by side it would be 1


@pytest.mark.parametrize("patch", [1, 2])
def test_an_upsampler_in_tiles_is_near_the_whole_and_has_no_seams(patch: int) -> None:
    config = UpsamplerConfig(low_size=32, image_size=128, channels=8, depth=1, multipliers=(1, 2), patch=patch)
    torch.manual_seed(0)
    model = Upsampler(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    low, x = _noise(2, 3, 32, 32).clamp(-1, 1) * 0.3, _noise(2, 3, 128, 128)
    t = torch.full((2,), 400)
    with torch.no_grad():
        whole = upsampler_denoise(model, low)(x, t).eps
        tiled = upsampler_denoise(model, low, tile=64)(x, t).eps
        assert torch.equal(upsampler_denoise(model, low, tile=128)(x, t).eps, whole)
    difference = tiled - whole  # of group norms' statistics, and of a tile's padded edges
    assert difference.abs().mean() < 0.1 * whole.std()
    edges = [*tile_starts(128, 64, 2 * patch)[1:], 64, 112]
    at_edges = torch.stack([difference[..., e] - difference[..., e - 1] for e in edges]).abs().mean()
    anywhere = difference.diff(dim=3).abs().mean()
    assert at_edges < 1.5 * anywhere


def test_a_tile_that_cannot_be_halved_is_refused() -> None:
    model = Upsampler(UpsamplerConfig(low_size=32, image_size=128, channels=8, depth=1, multipliers=(1, 2), patch=2))
    with pytest.raises(ValueError, match="tile is 30: this upsampler takes multiples of 4 px"):
        upsampler_denoise(model, _noise(1, 3, 32, 32), tile=30)
