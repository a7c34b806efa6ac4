"""What the internet has in store: files that are not what they should be, each with the reasons it may end with."""

import gzip
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.data.pairs.image import heif_is_there
from tests.pipeline.data.bench import picture
from tests.pipeline.data.hostile_costs import stored_bombs, time_bombs
from tests.pipeline.data.odd import chunk, encoded, png

SIDES = (80, 72)  # of most pictures
MAX_PIXELS = 1_000_000


@dataclass(frozen=True)
class File:
    """``ends``: reasons that its row may end with, None for kept. ``size``: width and height if it is kept."""

    name: str
    data: bytes
    ends: frozenset[str | None]
    size: tuple[int, int] = SIDES


def files() -> list[File]:
    """The corpus, the same at every call."""
    costly = [one(*named) for named in (*time_bombs(), *stored_bombs())]
    found = [*truncated(), *bombs(), *other_types(), *polyglots(), *pixels(), *damaged(), *costly]
    assert len({file.name for file in found}) == len(found)
    return found


def one(name: str, data: bytes, end: str | None, size: tuple[int, int] = SIDES) -> File:
    return File(name, data, frozenset({end}), size)


def sound() -> Image.Image:
    return Image.open(io.BytesIO(picture(1, *SIDES))).convert("RGB")


def truncated() -> Iterator[File]:
    """Cut at many places: before the pixels begin a header is broken, after it they end early."""
    image = sound()
    whole = {
        "png": encoded(image, "PNG"), "jpg": encoded(image, "JPEG"), "webp": encoded(image, "WEBP"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "lossless.webp": encoded(image, "WEBP", lossless=True),
    }  # fmt: skip
    for kind, data in whole.items():
        if kind.endswith("png"):
            magic, begin, last = 8, data.index(b"IDAT") + 4, len(data) - 40
        elif kind.endswith("jpg"):
            magic, begin, last = 3, data.index(b"\xff\xda") + 14, len(data) - 3
        else:
            magic, begin, last = 12, 12, len(data) - 1
        yield one(f"whole.{kind}", data, None)
        yield one(f"nothing.{kind}", b"", "zero_bytes")
        yield one(f"magic-cut.{kind}", data[: magic - 1], "not_an_image")
        for i in range(36):
            cut = begin + (last - begin) * i // 35
            yield one(f"cut-{cut}.{kind}", data[:cut], "truncated")
        for cut in range(magic, begin - 14, max((begin - magic) // 8, 1)):
            yield File(f"head-cut-{cut}.{kind}", data[:cut], frozenset({"decode_error", "truncated"}))


def bombs() -> Iterator[File]:
    """Small files that promise, or unpack to, more than anybody has."""
    for side in (1001, 5000, 20_000, 65_535, 2**31 - 1):
        yield one(f"bomb-{side}.png", png(side, side, rows=bytes(3000)), "too_many_pixels")
        yield one(f"bomb-wide-{side}.png", png(side * 1000 % 2**31, 1001, rows=bytes(3000)), "too_many_pixels")
    start = encoded(sound(), "JPEG")
    frame = start.index(b"\xff\xc0") + 5
    for side in (1100, 9999, 65_500):
        yield one(
            f"bomb-{side}.jpg", start[:frame] + struct.pack(">HH", side, side) + start[frame + 4 :], "too_many_pixels"
        )
    for side in (1 << 10, 1 << 13, 1 << 14):
        canvas = (side + 10).to_bytes(3, "little")
        body = b"WEBPVP8X" + struct.pack("<IB3x", 10, 0) + canvas + canvas
        # libwebp asks for the frame before it says how large the canvas is
        ends = frozenset({"too_many_pixels", "decode_error"})
        yield File(f"bomb-{side}.webp", b"RIFF" + struct.pack("<I", len(body)) + body, ends)
    rows = b"".join(b"\0" + bytes(24) for _ in range(8))
    many = zlib.compress(bytes(100 << 20), 9)  # 100 MiB in 100 KiB, where a text or a profile belongs
    text, profile = chunk(b"zTXt", b"a\0\0" + many), chunk(b"iCCP", b"a\0\0" + many)
    yield one("bomb-text.png", png(8, 8, text, rows=rows), "decode_error", (8, 8))
    yield File("bomb-profile.png", png(8, 8, profile, rows=rows), frozenset({None, "decode_error"}), (8, 8))
    yield one("bomb-rows.png", png(8, 8, rows=rows + bytes(100 << 20)), None, (8, 8))
    yield one("bomb.gz", gzip.compress(bytes(1 << 20)), "not_an_image")
    yield one("bomb.png.gz", gzip.compress(picture(1)), "not_an_image")


def other_types() -> Iterator[File]:
    """What is found behind links that end in .jpg."""
    image = sound()
    assert heif_is_there()
    for kind in ("ICO", "PPM", "TGA", "PCX", "DIB", "SGI", "JPEG2000"):
        yield one(f"as-{kind}.jpg", encoded(image, kind), "not_an_image")
    for kind in ("GIF", "BMP", "TIFF", "AVIF", "HEIF"):
        data = encoded(image, kind)
        yield one(f"as-{kind}.jpg", data, None)
        for i in range(8):
            cut = max(len(data) * i // 8, 16)
            yield File(f"cut-{i}-{kind}.jpg", data[:cut], frozenset({"truncated", "decode_error"}))
    for side in (5000, 65_535):
        frame = struct.pack("<HH3x", side, side) + b"," + struct.pack("<HHHH", 0, 0, side, side)
        yield one(f"bomb-{side}.gif", b"GIF89a" + frame + b"\0\2" + bytes(100), "too_many_pixels")
        yield one(f"bomb-{side}.bmp", encoded(image, "BMP")[:18] + struct.pack("<ii", side, side)
                  + encoded(image, "BMP")[26:], "too_many_pixels")  # fmt: skip
        entries = {256: side, 257: side, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: side, 279: 100}
        tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
        yield one(
            f"bomb-{side}.tif",
            b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + tags + bytes(4),
            "too_many_pixels",
        )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("a.png", picture(1))
    texts = {
        "html": b"<!DOCTYPE html><title>404</title>", "json": json.dumps({"error": "gone"}).encode(),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "xml": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/etc/passwd) run", "pdf": b"%PDF-1.7\n",
        "zip": archive.getvalue(), "mp4": b"\0\0\0\x20ftypisom" + bytes(100),
        "elf": b"\x7fELF" + bytes(100), "wav": b"RIFF\x24\0\0\0WAVEfmt ",
        "text": b"hello", "space": b" " * 5000, "zeros": bytes(5000), "ones": b"\xff" * 5000,
        "base64": b"data:image/png;base64,",
        "jp2": b"\0\0\0\x0cjP  \r\n\x87\n", "jxl": b"\xff\x0a" + bytes(100), "psd": b"8BPS\0\1" + bytes(100),
        "mng": b"\x8aMNG\r\n\x1a\n" + bytes(100), "jng": b"\x8bJNG\r\n\x1a\n" + bytes(100),
        "pickle": b"\x80\x04cos\nsystem\n",
    }  # fmt: skip
    for name, data in texts.items():
        yield one(f"{name}.jpg", data, "not_an_image")
    for brand in (b"heic", b"avif", b"mif1"):
        yield one(f"{brand.decode()}.jpg", b"\0\0\0\x18ftyp" + brand + bytes(100), "decode_error")


def polyglots() -> Iterator[File]:
    """Two things at once. What begins as a picture and decodes is one; what only holds one is none."""
    tails = {"html": b"<script>alert(1)</script>", "php": b"<?php system($_GET[0]); ?>", "zip": b"PK\5\6" + bytes(18)}
    for kind in ("PNG", "JPEG"):
        data = encoded(sound(), kind)
        for name, tail in tails.items():
            yield one(f"{kind}-and-{name}", data + tail, None)
            yield one(f"{name}-and-{kind}", tail + data, "not_an_image")
    yield File("gif-and-script", b"GIF89a/*" + bytes(20) + b"*/=1;alert(1)", frozenset({"decode_error", "truncated"}))
    yield one("png-then-jpeg", b"\x89PNG\r\n\x1a\n" + encoded(sound(), "JPEG"), "decode_error")
    yield one("jpeg-then-png", b"\xff\xd8\xff" + picture(1), "decode_error")
    yield one("comment.jpg", encoded(sound(), "JPEG", comment=b"*/ <?php phpinfo(); ?>" * 500), None)
    yield one("two-pictures.jpg", encoded(sound(), "JPEG") + encoded(sound().resize((9, 9)), "JPEG"), None)
    yield one("twice-ihdr.png", png(80, 72, chunk(b"IHDR", struct.pack(">IIBBBBB", 9**6, 9**6, 8, 2, 0, 0, 0)),
              rows=bytes(80 * 3 + 1) * 72), "too_many_pixels")  # fmt: skip


def pixels() -> Iterator[File]:
    """Unusual and sound, beyond odd_images: every one is kept."""
    image = sound()
    frames = [Image.new("RGB", SIDES, colour) for colour in ("red", "lime", "blue")]
    for kind in ("WEBP", "PNG"):
        yield one(f"animated.{kind}", encoded(frames[0], kind, save_all=True, append_images=frames[1:]), None)
    yield one("broken-exif.jpg", encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), None)
    for kind in ("JPEG", "PNG", "WEBP"):
        # As some user interfaces of Stable Diffusion write it; with dpi Pillow reads it late.
        no_tiff = encoded(image, kind, exif=b"Exif\0\0b'Exif\\x00", dpi=(72, 72))
        yield one(f"no-tiff-exif.{kind}", no_tiff, None, SIDES)
        yield one(f"odd-place.{kind}", encoded(image, kind, exif=odd_place()), None, SIDES[::-1])
    yield one("one-pixel.png", encoded(Image.new("RGB", (1, 1)), "PNG"), None, (1, 1))
    yield one("line.png", encoded(Image.new("RGB", (5000, 1)), "PNG"), None, (5000, 1))
    yield one("no-width.png", png(0, 8), "decode_error")


def odd_place() -> bytes:
    """EXIF that turns by 90 degrees, with a latitude in letters, which Pillow reads and cannot write again."""
    entries = [(0x0112, 3, 1, struct.pack(">HH", 6, 0)), (0x8825, 4, 1, struct.pack(">I", 38))]
    main = struct.pack(">H", len(entries)) + b"".join(struct.pack(">HHI", *e[:3]) + e[3] for e in entries)
    place = struct.pack(">H", 1) + struct.pack(">HHI", 2, 2, 4) + b"52N\0" + bytes(4)
    return b"Exif\0\0" + b"MM\0*" + struct.pack(">I", 8) + main + bytes(4) + place


def damaged() -> Iterator[File]:
    """A byte changed here and there: whatever comes of it, it is one of these and never more than one row."""
    draw = np.random.default_rng(0)
    ends = frozenset({None, "decode_error", "truncated", "too_many_pixels", "not_an_image"})
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = encoded(sound(), kind)
        for i in range(25):
            data = bytearray(whole)
            for at in draw.integers(0, len(data), 1 + i % 4):
                data[at] ^= int(draw.integers(1, 256))
            yield File(f"damaged-{i}.{kind}", bytes(data), ends, (0, 0))
