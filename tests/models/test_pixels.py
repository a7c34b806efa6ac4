import numpy as np
import pytest
import torch
from PIL import Image

from models.pixels import from_uint8, resize, to_uint8


def test_all_256_values_survive_the_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    scaled = from_uint8(values)
    assert scaled.min() == -1
    assert scaled.max() == 1
    assert torch.equal(to_uint8(scaled), values)


def test_values_beyond_the_range_are_clamped() -> None:
    assert to_uint8(torch.tensor([-3.0, 1.4])).tolist() == [0, 255]


@pytest.mark.parametrize("size", [(16, 16), (64, 48), (50, 20)])
def test_resize_equals_pillow(size: tuple[int, int]) -> None:
    """To one 8-bit level. Pillow rounds and clips between its two passes, so the image keeps clear of the ends."""
    image = torch.randint(64, 192, (1, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BICUBIC)
    ours = to_uint8(resize(from_uint8(image), size))[0].permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - np.asarray(expected).astype(int)).max() <= 1
