"""Views against Pillow's own way, which turns, converts and copies whatever it is given."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from models.view import open_view, upright_rgb, view
from tests.pipeline.data.odd import encoded

SIZE = 24


def picture(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8)
    image = Image.fromarray(pixels[..., :3])
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(pixels[..., 3]))
    return image.convert(mode)


def expected(data: bytes) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    left, top = ((side - min(image.size)) // 2 for side in image.size)
    square = (left, top, left + min(image.size), top + min(image.size))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, square))


MODES = [("RGB", "PNG"), ("L", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("CMYK", "JPEG")]


def test_views_are_pillows() -> None:
    files = [encoded(picture(mode), kind) for mode, kind in MODES]
    for orientation in range(9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        files += [encoded(picture("RGB"), kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP")]
    for data in files:
        assert np.array_equal(open_view(data, SIZE), expected(data))


def test_what_is_viewed_stays_as_it_is() -> None:
    image = picture("RGB")
    before = image.copy()
    view(image, SIZE)
    assert image == before


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_turned_once(kind: str) -> None:
    """However often it is asked to be upright, as a view of a pair's image is."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        xmp = f"<x:xmpmeta><tiff:Orientation>{orientation}</tiff:Orientation></x:xmpmeta>".encode()
        data = encoded(picture("RGB"), kind, exif=exif, xmp=xmp)
        once = upright_rgb(Image.open(io.BytesIO(data)))
        assert upright_rgb(once).tobytes() == once.tobytes()
        assert upright_rgb(once).size == once.size
