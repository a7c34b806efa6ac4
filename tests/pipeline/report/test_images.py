"""Tests that images are shrunk, encoded within their bytes, and counted against the page's budget."""

import base64
import io
import random
import re

import pytest
from PIL import Image

from pipeline.report.images import Album, shrink
from tests.pipeline.report.made_up import drawn, encoded


def noise(side: int) -> Image.Image:
    return Image.frombytes("RGB", (side, side), random.Random(0).randbytes(3 * side * side))


def test_a_small_image_keeps_every_pixel() -> None:
    original = drawn(64, "teal", "circle")
    data, kind, size = shrink(encoded(original), 512, 90_000)
    assert (kind, size) == ("png", (64, 64))
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == original.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_large_image_is_shrunk_and_keeps_its_shape(kind: str) -> None:
    data, form, size = shrink(encoded(drawn(1024, "gold", "square").resize((1000, 500)), kind), 512, 90_000)
    assert (form, size) == ("jpeg", (512, 256))
    opened = Image.open(io.BytesIO(data))
    assert opened.size == size
    centre = opened.getpixel((256, 128))
    assert isinstance(centre, tuple)
    assert max(abs(a - b) for a, b in zip(centre, (255, 215, 0), strict=True)) <= 6  # JPEG


def test_noise_gets_a_lower_quality_to_fit() -> None:
    high, _, _ = shrink(encoded(noise(512)), 512, 10**9)
    low, _, _ = shrink(encoded(noise(512)), 512, 150_000)
    assert len(low) < 160_000 < len(high)


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(noise(64))[:500], b"GIF89a" + bytes(50)])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a readable"):
        shrink(data, 64, 1000)


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(ValueError, match="too many for a report"):
        shrink(encoded(Image.new("1", (20_000, 4_000))), 64, 1000)


def test_the_album_counts_and_stops() -> None:
    data = encoded(drawn(64, "teal", "circle"))
    album = Album(10_000)
    shown = album.image(data, 64, 'a "teal" <circle>')
    assert 'alt="a &#34;teal&#34; &lt;circle&gt;"' in shown
    assert 'width="64" height="64"' in shown
    [uri] = re.findall(r'src="(data:image/png;base64,([^"]+))"', shown)
    assert base64.b64decode(uri[1]).startswith(b"\x89PNG")
    assert album.left == 10_000 - len(uri[0])
    album.left = 5
    with pytest.raises(ValueError, match="reached its size"):
        album.image(data, 64, "")
    assert album.left == 5
