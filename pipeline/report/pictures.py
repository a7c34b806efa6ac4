"""Pictures inside the page, as data URIs, within a budget of bytes."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Collection

from PIL import Image, UnidentifiedImageError

from models.view import upright_rgb
from pipeline.report.markup import text

PICTURE_BYTES = 4 << 20  # of base64; the page's text and figures take well under the MiB that is left
MOST_PIXELS = 64 << 20
QUALITIES = (88, 75, 60, 40)


class Album:
    """Counts the characters that pictures take, so that the page never outgrows its limit.

    ``licenses``: those of other people's pictures that may be shown, or None for any. ``met``: those that pictures had.
    """

    def __init__(self, budget: int = PICTURE_BYTES, licenses: Collection[str] | None = None):
        self.left = budget
        self.licenses = licenses
        self.met: set[str] = set()

    def may_show(self, license: str | None) -> bool:
        """Whether a picture of this licence, None for an unknown one, may be shown."""
        if license is not None:
            self.met.add(license)
        return self.licenses is None or license in self.licenses

    def image(self, data: bytes, side: int, alt: str, most: int = 90_000) -> str:
        """An <img> of at most ``side`` px and about ``most`` bytes, with an alternative text.

        Raises ValueError for bytes that are no PNG, JPEG or WebP, for too many pixels, or when the budget is spent.
        """
        encoded, kind, size = shrink(data, side, most)
        uri = f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
        if len(uri) > self.left:
            raise ValueError("the page has reached its size")
        self.left -= len(uri)
        # Few pixels are shown as they are: a browser's smoothing would flatter or blur them.
        style = ' class="pixels"' if max(size) <= 64 else ""
        return f'<img src="{uri}" width="{size[0]}" height="{size[1]}" alt="{text(alt)}"{style}>'


def shrink(data: bytes, side: int, most: int) -> tuple[bytes, str, tuple[int, int]]:
    """Encoded bytes, "png" or "jpeg", and (width, height), of a picture made upright, and no larger than ``side`` px.

    PNG if that fits into ``most`` bytes, else JPEG of falling quality. Raises ValueError as Album.image does.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    raise ValueError(f"{opened.width} by {opened.height} pixels are too many for a report")
                opened.draft("RGB", (side, side))
                picture = upright_rgb(opened)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as e:
        raise ValueError(f"not a readable PNG, JPEG or WebP ({e})") from e
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if picture.width * picture.height <= 256 * 256:
        picture.save(out, "PNG")
        if out.tell() <= most // 4:
            return out.getvalue(), "png", picture.size
    for quality in QUALITIES:
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=quality)
        if out.tell() <= most:
            break
    return out.getvalue(), "jpeg", picture.size
