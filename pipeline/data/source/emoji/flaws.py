"""Lists nine flawed pairs, so that the quick start shows what becomes of bad rows before a user meets their own.

One is the address of a row of every other subset, one has no caption; of the others the bytes are at fault, or the size
of the image, or the length of the caption. They follow the other list, ``emoji:flawed``; no model is trained on them.
"""

from __future__ import annotations

import io

from PIL import Image

from pipeline.data.source.emoji.listing import HOST, EmojiRow, draw_emoji, emoji_rows

FLAWED = "/flawed/"
_APPLE, _ROCKET, _CAT, _TREE = (f"/256/twemoji/white/{code}.png" for code in ("1F34E", "1F680", "1F431", "1F333"))
_CAPTIONS = {
    "missing": "a flat twemoji picture that nobody has kept",
    "page": "a flat twemoji picture behind a login page",
    "cut": "a flat twemoji picture of a red apple, cut off on its way",
    "empty": "a flat twemoji picture of nothing at all",
    "small": "a flat twemoji picture of a rocket, 32 px wide",
    "strip": "four flat twemoji pictures in a row",
    "untold": "",
    "long": "a flat twemoji picture of a tree," + " and more keywords for search engines" * 30,
}


def flawed_rows() -> list[EmojiRow]:
    """Returns the list, in its fixed order. Raises UserError if the demo packages are missing."""
    twice = next(row for row in emoji_rows("nano") if "/twemoji/" in row.url)
    rights = twice.license, twice.attribution
    rows = [
        EmojiRow(f"http://{HOST}{FLAWED}{name}.png", (caption,), "flawed", "train", *rights)
        for name, caption in _CAPTIONS.items()
    ]
    return [*rows, twice]


def flawed_bytes(url_path: str) -> bytes:
    """Returns what is served under the path of such a row. Raises LookupError for a path without bytes."""
    match url_path.removeprefix(FLAWED).removesuffix(".png"):
        case "page":
            return b"<!doctype html><title>Please log in</title>"
        case "cut":
            return draw_emoji(_APPLE)[:2000]
        case "empty":
            return b""
        case "small":
            return _png(Image.open(io.BytesIO(draw_emoji(_ROCKET))).resize((32, 32)))
        case "strip":
            strip = Image.new("RGB", (1024, 256))
            for i, path in enumerate((_APPLE, _ROCKET, _CAT, _TREE)):
                strip.paste(Image.open(io.BytesIO(draw_emoji(path))), (256 * i, 0))
            return _png(strip)
        case "untold":
            return draw_emoji(_CAT)
        case "long":
            return draw_emoji(_TREE)
    raise LookupError(f"{url_path}: no such image")


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
