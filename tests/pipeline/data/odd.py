"""Sound images of unusual kinds: what a phone, a scanner, a printer or an editor writes."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageCms

SIDES = (80, 72)  # as they are stored; orientations from 5 on turn them


def odd_images() -> dict[str, bytes]:
    """Returns the bytes of every image by a name that ends as its kind does. The same at every call."""
    return dict(_all())


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Returns a file of one of Pillow's kinds."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """Returns a PNG's chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    """Returns a PNG by hand; ``extra`` chunks come before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def rgb_profile(red: tuple[float, float], green: tuple[float, float], blue: tuple[float, float], gamma: float) -> bytes:
    """Returns a matrix profile of these primaries (CIE x, y) with white D65, made by hand as ICC.1:2001 says."""
    white = np.array([0.3127, 0.3290])
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in (red, green, blue, white)]).T
    matrix = columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1.0, 0.8249])
    adapted = np.linalg.inv(bradford) @ np.diag((bradford @ d50) / (bradford @ columns[:, 3])) @ bradford @ matrix

    def fixed(values: np.ndarray) -> bytes:
        return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"a\0" + bytes(79)
    tags = {
        b"desc": text + bytes(-len(text) % 4), b"cprt": b"text\0\0\0\0" + b"a\0\0\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(d50),
        **{name: b"XYZ \0\0\0\0" + fixed(adapted[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }  # fmt: skip
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4s4s4s4s4s", 0, b"none", b"\x02\x20\0\0", b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    whole = head + bytes(28) + fixed(d50) + bytes(48) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


ADOBE_RGB = rgb_profile((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), 563 / 256)
DISPLAY_P3 = rgb_profile((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), 2.2)


def _all() -> Iterator[tuple[str, bytes]]:
    y, x = np.mgrid[0:72, 0:80]
    smooth = np.stack([x * 3, y * 3, 255 - x * 3], -1).astype(np.uint8)
    image = Image.fromarray(smooth)
    clear = image.copy()
    clear.putalpha(Image.fromarray((y * 3).astype(np.uint8)))
    grey16 = np.linspace(0, 65535, 80 * 72).astype(">u2").reshape(72, 80)
    rows16 = b"".join(b"\0" + row.tobytes() for row in grey16)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("adobe", ADOBE_RGB), ("p3", DISPLAY_P3), ("srgb", srgb), ("junk", b"junk")):
        for kind in ("png", "jpeg", "webp"):
            yield f"icc-{name}.{kind}", encoded(image, kind, icc_profile=profile)
    yield "icc-alpha.png", encoded(clear, "png", icc_profile=ADOBE_RGB)
    yield "icc-palette.png", encoded(image.quantize(16), "png", icc_profile=DISPLAY_P3)
    yield "grey16.png", png(*SIDES, depth=16, colour=0, rows=rows16)
    yield (
        "grey16-key.png",
        png(*SIDES, chunk(b"tRNS", struct.pack(">H", grey16[40, 40])), depth=16, colour=0, rows=rows16),
    )
    yield "rgb16.png", png(*SIDES, depth=16, rows=b"".join(b"\0" + row.repeat(3).tobytes() for row in grey16))
    yield "rgba16.png", png(*SIDES, depth=16, colour=6, rows=b"".join(b"\0" + r.repeat(4).tobytes() for r in grey16))
    yield "cmyk.jpeg", encoded(image.convert("CMYK"), "jpeg")
    yield "palette.png", encoded(image.quantize(16), "png", transparency=3)
    yield "grey.jpeg", encoded(image.convert("L"), "jpeg")
    yield "progressive.jpeg", encoded(image, "jpeg", progressive=True)
    for mode in ("1", "L", "LA", "P", "RGBA"):
        yield f"{mode}.png", encoded((clear if mode in ("LA", "RGBA") else image).convert(mode), "png")
    yield "RGBA.webp", encoded(clear, "webp", lossless=True)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        for kind in ("png", "jpeg", "webp"):
            yield f"turned-{orientation}.{kind}", encoded(image, kind, exif=exif)
