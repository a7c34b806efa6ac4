"""Keys, and what a picture becomes before it is stored."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.pairs.image import LONGEST_SIDE, MAX_SCANS, StoredImage, Storing, prepare, too_many_scans
from pipeline.data.source.segments import row_key


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


@settings(max_examples=60)
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


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("keep_ratio", (12, 40), (12, 40)), ("keep_ratio_largest", (64, 32), (16, 8)),
        ("center_crop", (64, 32), (16, 16)), ("center_crop", (12, 10), (12, 10)),
        ("border", (64, 32), (16, 16)), ("no", (64, 32), (64, 32)),
    ],
)  # fmt: skip
def test_modes_are_img2datasets(mode: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    picture = prepare(encoded(noise(*size)), 1_000_000, Storing(16, "png", 3, mode))
    assert isinstance(picture, StoredImage)
    assert (picture.width, picture.height) == expected


def test_what_is_transparent_becomes_white() -> None:
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30])
    images = [
        (encoded(palette), [10, 20, 30]),
        (encoded(palette, transparency=0), [255, 255, 255]),
        (encoded(Image.new("LA", (8, 8), (0, 0))), [255, 255, 255]),
        (encoded(Image.new("RGBA", (8, 8), (200, 0, 0, 51))), [244, 204, 204]),
    ]
    for data, colour in images:
        assert decoded(small(data))[0, 0].tolist() == colour


@pytest.mark.parametrize("kind", [np.int32, np.int16, np.float32])
def test_pixels_that_do_not_say_which_is_white_are_refused(kind: type) -> None:
    """Pillow would clip them at 255: a scan or a micrograph would be white all over, or black."""
    assert small(encoded(np.linspace(0, 4000, 64).reshape(8, 8).astype(kind), "TIFF")) == "decode_error"


def test_the_long_side_is_bounded_by_the_short_ones_limit() -> None:
    """So what is stored is, whatever its aspect: at most 3 bytes for each of 8 squares."""
    assert small(encoded(noise(64, 64 * LONGEST_SIDE + 16))) == "too_long"
    for kind, quality in (("jpg", 100), ("png", 0), ("webp", 100)):
        largest = small(encoded(noise(16 * LONGEST_SIDE, 16)), kind=kind, quality=quality)
        assert isinstance(largest, StoredImage)
        assert len(largest.data) <= 3 * LONGEST_SIDE * 16**2 + 1024


SCAN, END = b"\xff\xda", b"\xff\xd9"


def progressive(**options: object) -> tuple[bytes, bytes]:
    """A progressive JPEG without its end, and its last scan."""
    whole = encoded(smooth(80, 72), "JPEG", progressive=True, **options)[:-2]
    return whole, whole[whole.rfind(SCAN) :]


@pytest.mark.parametrize(
    "marker", [b"\xff\1", b"\xff\xff\1", b"\xff\2", b"\xff\xbf", b"\xff\xd0", b"\xff\xd7", b"\xff"]
)
def test_no_marker_hides_scans(marker: bytes) -> None:
    """Of 3,000 scans in 66 KB, or 36 KB; those of markers that have no length of their own."""
    whole, last = progressive()
    data = whole + (marker + last[:10] + b"\0" * 10) * 3000 + END
    assert too_many_scans(data, MAX_SCANS)
    assert prepare(data, 1_000_000, Storing(64)) == "decode_error"


def scans_of(jpeg: bytes) -> int:
    """Counts scans byte by byte as libjpeg's jdmarker.c does, up to its first error or the end.

    Where a decoder of entropy-coded data looks for a restart, it passes over reserved markers (02 to BF), which are an
    error elsewhere; here they are passed over always.
    """
    at, scans = 2, 0
    while True:
        while at < len(jpeg) and jpeg[at] != 0xFF:
            at += 1
        while at < len(jpeg) and jpeg[at] == 0xFF:
            at += 1
        if at >= len(jpeg):
            return scans
        marker, at = jpeg[at], at + 1
        if marker == 0xD9:
            return scans
        if marker < 0xC0 or 0xD0 <= marker <= 0xD7:
            continue
        if marker in (0xC8, 0xD8, 0xDE, 0xDF) or 0xF0 <= marker <= 0xFD:
            return scans  # libjpeg gives up
        scans += marker == 0xDA
        length = int.from_bytes(jpeg[at : at + 2])
        at += 2 + max(0, length - 2)


PIECES = st.one_of(
    st.sampled_from([progressive()[1], SCAN + b"\0\x0c", END, b"\0\0", b"\0\1", b"\0\4", b"\xff"]),
    st.integers(0, 255).map(lambda kind: bytes([0xFF, kind])),
    st.binary(max_size=6),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12), st.integers(10, 16))
def test_no_fewer_scans_are_counted_than_libjpeg_finds(pieces: list[bytes], most: int) -> None:
    data = progressive()[0] + b"".join(pieces)
    assert too_many_scans(data, most) >= (scans_of(data) > most)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(range(1, MAX_SCANS - 9)),
    st.sampled_from([b"", b"\xff\1", b"\xff\xd2", b"\xff\xfe\0\4\xff\xda", b"\xff\xe1\0\x06\xff\xda\xff\xda"]),
)
def test_few_enough_scans_are_not_too_many(times: int, between: bytes) -> None:
    whole, last = progressive()
    data = whole + (between + last[:10]) * times + END
    assert scans_of(data) == 10 + times <= MAX_SCANS
    assert not too_many_scans(data, MAX_SCANS)
