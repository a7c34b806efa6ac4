"""Strips and animations: every image whole, in order, and nothing else."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.sampling.edits import END_MS, FRAME_MS, GAP, WIDEST, animation, enlarged, strip


def squares(count: int, side: int) -> list[np.ndarray]:
    """Images of one grey each, none of them white."""
    return [np.full((side, side, 3), 10 + i, np.uint8) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "side", "columns", "rows"),
    [(1, 256, 1, 1), (9, 256, 9, 1), (12, 256, 6, 2), (5, 1024, 2, 3), (19, 128, 19, 1), (3, 3000, 1, 3)],
)
def test_images_stand_in_reading_order(count: int, side: int, columns: int, rows: int) -> None:
    whole = strip(squares(count, side))
    step = side + GAP
    assert whole.shape == (rows * step - GAP, columns * step - GAP, 3)
    assert whole.shape[1] <= max(WIDEST, side)
    for i in range(columns * rows):
        top, left = i // columns * step, i % columns * step
        assert (whole[top : top + side, left : left + side] == (10 + i if i < count else 255)).all()
        assert (whole[top : top + side, left + side : left + step] == 255).all()
        assert (whole[top + side : top + step, left : left + side] == 255).all()


@pytest.mark.parametrize(("side", "shown"), [(16, 128), (50, 150), (64, 128), (128, 128), (256, 256)])
def test_small_images_are_enlarged_pixel_by_pixel(side: int, shown: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    large = enlarged(image)
    assert large.shape == (shown, shown, 3)
    nearest = Image.fromarray(image).resize((shown, shown), Image.Resampling.NEAREST)
    assert np.array_equal(large, np.asarray(nearest))


def test_two_images_go_forth_and_back() -> None:
    with Image.open(io.BytesIO(animation(squares(2, 64), {"a": "é"}))) as moving:
        assert moving.n_frames == 2  # type: ignore[attr-defined]
        assert moving.getexif()[0x010E] == r'{"a": "\u00e9"}'


def test_a_image_like_the_one_before_adds_its_time() -> None:
    first, second = squares(2, 64)
    with Image.open(io.BytesIO(animation([first, first, second], {}))) as moving:
        times = []
        for frame in range(moving.n_frames):  # type: ignore[attr-defined]
            moving.seek(frame)
            moving.load()
            times.append(moving.info["duration"])
    assert sum(times) == 2 * END_MS + 2 * FRAME_MS
    assert len(times) < 4
