"""Images that cost more than they look: time of a decoder, or bytes that are stored."""

import io
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.pipeline.data.odd import chunk, encoded, png

LONG = 8 * 1024  # of a stored image, by the default of pairs.image_size
SCAN, END = b"\xff\xda", b"\xff\xd9"
Named = tuple[str, bytes, str | None, tuple[int, int]]  # name, bytes, reason, sides if it is kept


def smooth(mode: str) -> Image.Image:
    y, x = np.mgrid[0:72, 0:80]
    return Image.fromarray(np.stack([x * 3, y * 3, 255 - x * 3], -1).astype(np.uint8)).convert(mode)


def time_bombs() -> Iterator[Named]:
    """Progressive JPEGs whose scans are repeated, and files of very many small parts."""
    for mode in ("RGB", "L", "CMYK"):
        whole = encoded(smooth(mode), "JPEG", progressive=True)
        places = [i for i in range(len(whole)) if whole.startswith(SCAN, i)]
        last = whole[places[-1] : -2]
        parts = {
            "first": whole[places[0] : places[1]] * 500,
            "last": last * 700,
            "empty": last[:10] * 900,
            "commented": (b"\xff\xfe\0\4ab" + last) * 501,
            "padded": (b"\xff\xff\xff" + last) * 501,
            "behind-restart": (b"\xff\xd3" + last[:10]) * 3000,
        }
        for name, part in parts.items():
            yield f"scans-{mode}-{name}.jpg", whole[:-2] + part + END, "decode_error", (80, 72)
        data = whole[:-2] + last * (500 - len(places)) + END
        yield f"scans-{mode}-just-few-enough.jpg", data, None, (80, 72)
    plain = encoded(smooth("RGB"), "JPEG")
    yield "comments.jpg", plain[:2] + b"\xff\xfe\0\2" * 40_000 + plain[2:], None, (80, 72)
    yield "scans-in-a-comment.jpg", encoded(smooth("RGB"), "JPEG", comment=SCAN * 9000), None, (80, 72)
    yield "scans-behind.jpg", plain + SCAN * 9000, None, (80, 72)
    yield "fill.jpg", plain[:2] + b"\xff" * 150_000 + plain[2:], None, (80, 72)
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(smooth("RGB")))
    yield "chunks.png", png(80, 72, *[chunk(b"tEXt", b"a\0")] * 10_000, rows=rows), None, (80, 72)
    yield "own-chunks.png", png(80, 72, *[chunk(b"raRe", b"")] * 10_000, rows=rows), None, (80, 72)
    loop = b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0"  # a directory that is its own next one
    yield "loop-exif.jpg", encoded(smooth("RGB"), "JPEG", exif=loop), None, (80, 72)
    wide = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5000) + b"\x12\1\3\0\1\0\0\0\1\0\0\0" * 5000
    yield "many-orientations.jpg", encoded(smooth("RGB"), "JPEG", exif=wide + bytes(4)), None, (80, 72)
    frames = [Image.new("RGB", (8, 8), (i, 255 - i, 0)) for i in range(200)]
    for kind in ("WEBP", "PNG"):
        yield f"frames.{kind}", encoded(frames[0], kind, save_all=True, append_images=frames[1:]), None, (8, 8)


def stored_bombs() -> Iterator[Named]:
    """Long images of noise that repeats: deflate finds that, and JPEG cannot."""
    draw = np.random.default_rng(0)
    for long, short in ((LONG + 1, 1), (LONG + 1, 8), (16_000, 60), (60_000, 16)):
        noise = np.tile(draw.integers(0, 256, (short, 8, 3), np.uint8), (1, -(-long // 8), 1))[:, :long]
        for turned in (False, True):
            image = Image.fromarray(noise.transpose(1, 0, 2) if turned else noise)
            name = f"long-{long}-{short}-{'tall' if turned else 'wide'}"
            yield f"{name}.png", encoded(image, "PNG", compress_level=9), "too_long", image.size
            if long < 16_384 and short < 64:
                yield f"{name}.webp", encoded(image, "WEBP", quality=1), "too_long", image.size
                yield f"{name}.jpg", encoded(image, "JPEG", quality=1), "too_long", image.size
    for width, height in ((LONG, 1), (1, LONG), (LONG, 100), (100, LONG), (LONG - 1, 8), (1000, 1000)):
        data = encoded(Image.new("RGB", (width, height), "teal"), "PNG", compress_level=9)
        yield f"long-enough-{width}-{height}.png", data, None, (width, height)
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", (LONG + 1, 9)).save(out, "JPEG", exif=exif)
    yield "long-turned.jpg", out.getvalue(), "too_long", (9, LONG + 1)
