"""Keys, and what a picture becomes before it is stored."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipeline.data.pairs.image import LONGEST_SIDE, MAX_SCANS, StoredImage, Storing, inspect, prepare
from pipeline.data.source.stage import row_key


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 255 - 255 * x / width], axis=-1).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def decoded(picture: StoredImage | str) -> np.ndarray:
    assert isinstance(picture, StoredImage), picture
    return np.asarray(Image.open(io.BytesIO(picture.data)))


def test_keys_are_img2datasets_sort_like_rows_and_have_one_width() -> None:
    from img2dataset.downloader import compute_key

    places = [(0, 0), (0, 9999), (1, 0), (99_999, 5), (100_000, 0), (99_999_999, 9999)]
    keys = [row_key(shard, row) for shard, row in places]
    assert keys == sorted(keys)
    assert {len(key) for key in keys} == {12}
    assert keys[3] == "000999990005"
    assert keys == [compute_key(row, shard, 4, 8) for shard, row in places]


def small(data: bytes, image_size: int = 16, kind: str = "png", quality: int = 3) -> StoredImage | str:
    return prepare(data, 1_000_000, Storing(image_size, kind, quality))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    image_size=st.integers(12, 64),  # no side here is 8 times as long
    stored=st.sampled_from([("jpg", 95), ("jpg", 60), ("png", 3), ("webp", 80)]),
    saved=st.sampled_from(
        [
            ("PNG", {}),
            ("JPEG", {"quality": 90}),
            ("JPEG", {"progressive": True, "subsampling": 0}),
            ("WEBP", {"lossless": True}),
        ]
    ),
)
def test_equals_img2datasets_own_resizer(
    size: tuple[int, int], image_size: int, stored: tuple[str, int], saved: tuple[str, dict[str, object]]
) -> None:
    """Of a plain RGB picture, the same bytes."""
    from img2dataset.resizer import Resizer

    data = encoded(noise(*size), saved[0], **saved[1])
    expected, width, height, *_ = Resizer(
        image_size, "keep_ratio", True, encode_format=stored[0], encode_quality=stored[1]
    )(io.BytesIO(data))
    assert prepare(data, 1_000_000, Storing(image_size, *stored)) == StoredImage(expected, width, height, stored[0])


@pytest.mark.parametrize(("size", "expected"), [((64, 32), (32, 16)), ((32, 64), (16, 32)), ((12, 40), (12, 40))])
def test_the_short_side_shrinks_and_nothing_grows(size: tuple[int, int], expected: tuple[int, int]) -> None:
    picture = small(encoded(noise(*size)))
    assert isinstance(picture, StoredImage)
    assert (picture.width, picture.height) == expected
    assert Image.open(io.BytesIO(picture.data)).size == expected


@pytest.mark.parametrize(("kind", "quality"), [("jpg", 95), ("png", 6), ("webp", 90)])
def test_bytes_are_reproducible_in_every_format(kind: str, quality: int) -> None:
    data = encoded(smooth(50, 40))
    picture = small(data, kind=kind, quality=quality)
    assert isinstance(picture, StoredImage)
    assert picture == small(data, kind=kind, quality=quality)
    assert picture.extension == kind
    assert Image.open(io.BytesIO(picture.data)).format == {"jpg": "JPEG"}.get(kind, kind.upper())


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("keep_ratio", (64, 32), (32, 16)), ("keep_ratio_largest", (64, 32), (16, 8)),
        ("center_crop", (64, 32), (16, 16)), ("center_crop", (12, 10), (12, 10)),
        ("border", (64, 32), (16, 16)), ("no", (64, 32), (64, 32)),
    ],
)  # fmt: skip
def test_modes_are_img2datasets(mode: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    picture = prepare(encoded(noise(*size)), 1_000_000, Storing(16, "png", 3, mode))
    assert isinstance(picture, StoredImage)
    assert (picture.width, picture.height) == expected


def test_an_image_below_the_least_side_is_rejected() -> None:
    for least, reason in ((12, None), (13, "too_small")):
        found = prepare(encoded(noise(40, 12)), 1_000_000, Storing(16, "png", 3, min_image_size=least))
        assert found == reason or (reason is None and isinstance(found, StoredImage))


def test_area_interpolation_is_the_mean() -> None:
    pixels = noise(64, 64)
    expected = pixels.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(decoded(small(encoded(pixels))) - expected).max() <= 0.5


def test_every_kind_of_pixel_becomes_rgb_on_white() -> None:
    def corner(image: Image.Image, kind: str = "PNG", **options: object) -> list[int]:
        pixels = decoded(small(encoded(image, kind, **options)))
        assert pixels.shape == (8, 8, 3)
        return [int(value) for value in pixels[0, 0]]

    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30])
    assert corner(palette) == [10, 20, 30]
    assert corner(palette, transparency=0) == [255, 255, 255]
    assert corner(Image.new("L", (8, 8), 77)) == [77, 77, 77]
    assert corner(Image.new("LA", (8, 8), (0, 0))) == [255, 255, 255]
    assert corner(Image.new("1", (8, 8), 1)) == [255, 255, 255]
    assert corner(Image.new("RGBA", (8, 8), (200, 0, 0, 0))) == [255, 255, 255]
    assert corner(Image.new("RGBA", (8, 8), (200, 0, 0, 51))) == [244, 204, 204]
    assert corner(Image.fromarray(np.full((8, 8), 0x8000, np.uint16))) == [128, 128, 128]
    assert corner(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG", quality=95) == [0, 0, 0]


def test_exif_orientation_turns_the_pixels() -> None:
    image = Image.fromarray(smooth(24, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    turned = decoded(small(encoded(image, "PNG", exif=exif)))
    assert np.array_equal(turned, np.rot90(smooth(24, 8), -1))
    assert inspect(encoded(image, "PNG", exif=exif), 1_000_000) == (8, 24)


def test_an_embedded_profile_is_converted_and_a_broken_one_ignored() -> None:
    image = Image.new("RGB", (8, 8), (200, 10, 10))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")  # red is blue
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # not for RGB pictures
    red, blue = [200, 10, 10], [10, 10, 200]
    for profile, expected in [(srgb, red), (swapped, blue), (lab, red), (b"junk", red)]:
        pixel = decoded(small(encoded(image, icc_profile=profile)))[0, 0].astype(int)
        assert np.abs(pixel - expected).max() <= 3


def png_bomb(width: int, height: int) -> bytes:
    """A PNG that claims ``width`` x ``height`` pixels and is small."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * width) * 10)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)


TOO_WIDE = encoded(Image.new("L", (70_000, 2)))  # for a JPEG; it decodes


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero_bytes"),
        (b"<!DOCTYPE html><html>not here</html>", "not_an_image"),
        (encoded(smooth(8, 8), "GIF"), "not_an_image"),
        (encoded(smooth(8, 8), "BMP"), "not_an_image"),
        (png_bomb(30_000, 30_000), "too_many_pixels"),  # above Pillow's own limit
        (png_bomb(2000, 1000), "too_many_pixels"),  # above ours
        (encoded(noise(200, 200))[:60_000], "truncated"),
        (encoded(noise(200, 200), "JPEG")[:5_000], "truncated"),
        (encoded(noise(200, 200), "JPEG")[:-2_000], "truncated"),
        (encoded(noise(200, 200), "WEBP")[:5_000], "truncated"),
        (b"\xff\xd8\xff" + bytes(100), "decode_error"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "decode_error"),
        (TOO_WIDE, "too_long"),
    ],
)
def test_a_bad_picture_has_its_reason(data: bytes, reason: str) -> None:
    assert prepare(data, 1_000_000, Storing(16, "jpg", 90)) == reason
    assert inspect(data, 1_000_000) == reason or data == TOO_WIDE


def test_a_jpeg_may_have_some_scans_and_not_hundreds() -> None:
    """Every scan goes over all pixels: a few hundred bytes of them cost seconds (LJT-01-003)."""
    whole = encoded(smooth(80, 72), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    scans = whole.count(b"\xff\xda")
    assert scans > 5
    for count, reason in ((MAX_SCANS, None), (MAX_SCANS + 1, "decode_error")):
        data = whole[:-2] + whole[last:-2] * (count - scans) + b"\xff\xd9"
        found = prepare(data, 1_000_000, Storing(16, "jpg", 90))
        assert found == reason or (reason is None and isinstance(found, StoredImage))
        assert inspect(data, 1_000_000) == (reason or (80, 72))


@pytest.mark.parametrize("where", ["comment", "behind"])
def test_what_only_looks_like_scans_does_not_count(where: str) -> None:
    """As in a thumbnail, or in the film that some cameras put behind a picture."""
    many = b"\xff\xda" * 2000
    data = encoded(smooth(80, 72), "JPEG", **({"comment": many} if where == "comment" else {}))
    assert inspect(data + (many if where == "behind" else b""), 1_000_000) == (80, 72)


def test_the_long_side_is_bounded_by_the_short_ones_limit() -> None:
    """So what is stored is, whatever its aspect: at most 3 bytes for each of 8 squares."""
    assert small(encoded(noise(16 * LONGEST_SIDE, 16))) != "too_long"
    assert small(encoded(noise(16 * LONGEST_SIDE + 1, 16))) == "too_long"
    assert small(encoded(noise(64, 64 * LONGEST_SIDE + 16))) == "too_long"
    assert small(encoded(np.zeros((1, 16 * LONGEST_SIDE + 1, 3), np.uint8))) == "too_long"
    for kind, quality in (("jpg", 100), ("png", 0), ("webp", 100)):
        largest = small(encoded(noise(16 * LONGEST_SIDE, 16)), kind=kind, quality=quality)
        assert isinstance(largest, StoredImage)
        assert len(largest.data) <= 3 * LONGEST_SIDE * 16**2 + 1024


def test_an_honest_large_png_passes() -> None:
    stored = prepare(encoded(noise(1536, 1024)), 64_000_000, Storing(1024, "png", 3))
    assert isinstance(stored, StoredImage)
    assert (stored.width, stored.height) == (1536, 1024)
