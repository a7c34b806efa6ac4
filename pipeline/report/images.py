"""Embeds images in the page as data URIs, within a budget of bytes."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Collection

from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from models.view import upright_rgb
from pipeline.report.html import PARTS

IMAGE_BYTES = 4 << 20  # of base64; the page's text and figures take well under the MiB that is left
MOST_PIXELS = 64 << 20  # of an image that is decoded here, 200 MB as RGB
QUALITIES = (88, 75, 60, 40)  # of JPEG, the best that fits; the last whether it fits or not


class Album:
    """Counts the characters that images take, so that the page never outgrows its limit.

    Attributes:
        left: Characters that further images may take.
        licenses: Licences of other people's images that may be shown, or None for any.
        met: Licences of the images that were to be shown.
    """

    def __init__(self, budget: int = IMAGE_BYTES, licenses: Collection[str] | None = None):
        self.left = budget
        self.licenses = licenses
        self.met: set[str] = set()

    def may_show(self, license: str | None) -> bool:
        """Returns whether an image of this licence, None for an unknown one, may be shown."""
        if license is not None:
            self.met.add(license)
        return self.licenses is None or license in self.licenses

    def image(self, data: bytes, side: int, alt: str, most: int = 90_000) -> Markup:
        """Returns an <img> of at most ``side`` px and about ``most`` bytes, with an alternative text.

        Raises ValueError for bytes other than PNG, JPEG or WebP, for too many pixels, or when the budget is spent.
        """
        encoded, kind, size = shrink(data, side, most)
        uri = f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
        if len(uri) > self.left:
            raise ValueError("the report has reached its size limit")
        self.left -= len(uri)
        return PARTS.image(Markup(uri), size, alt)


def shrink(data: bytes, side: int, most: int) -> tuple[bytes, str, tuple[int, int]]:
    """Returns encoded bytes, "png" or "jpeg", and (width, height) of an image, upright and at most ``side`` px.

    Chooses PNG for up to 256 x 256 px and a quarter of ``most`` bytes, else JPEG of falling quality. Raises ValueError
    as Album.image does.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS bounds it
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    raise ValueError(f"{opened.width} by {opened.height} pixels are too many for a report")
                opened.draft("RGB", (side, side))
                image = upright_rgb(opened)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as e:
        raise ValueError(f"not a readable PNG, JPEG or WebP ({e})") from e
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if image.width * image.height <= 256 * 256:
        image.save(out, "PNG")
        if out.tell() <= most // 4:
            return out.getvalue(), "png", image.size
    for quality in QUALITIES:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        if out.tell() <= most:
            break
    return out.getvalue(), "jpeg", image.size
