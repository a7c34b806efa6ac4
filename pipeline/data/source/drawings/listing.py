"""Lists the drawings of the quick start, with captions and splits; draws nothing.

The list is a pure function of hashes: a row's style, parts and side are hashes of its number, so that none of them
moves when the list grows. Pairs of values are held out ("a crown on a bell"), never a single value.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from functools import cache
from itertools import count, islice, product
from typing import NamedTuple

from pipeline.data.source.drawings.world import (
    PACKAGES,
    PARTS,
    VERSION,
    Drawing,
    captions,
    drawing_url,
    hash_fraction,
    require_packages,
)
from pipeline.errors import UserError

SUBSETS = {"nano": 320, "nano-more": 352, "tiny": 1500, "full": 6600}  # rows, each the beginning of the next
LICENSE = "CC0-1.0"
_STYLES = {"critters": 0.45, "sprouts": 0.8, "planets": 1.0}  # where shares end; those with more parts have more rows
_LARGE = 0.04  # share of 1024 px

# The pairs of parts of which pairs of values are held out. All tests together are 6% of the rows, and validation 4%.
_HELD_OUT = {
    "test": {
        "critters": (("body", "top"), ("eyes", "mouth"), ("colour", "top")),
        "sprouts": (("plant", "pot"), ("eyes", "mouth"), ("plant", "colour")),
        "planets": (("surface", "colour"), ("colour", "ring")),
    },
    "validation": {
        "critters": (("body", "top"), ("eyes", "mouth")),
        "sprouts": (("plant", "pot"), ("eyes", "mouth")),
        "planets": (("surface", "colour"),),
    },
}


class DrawingRow(NamedTuple):
    """Holds an image and its captions, the whole one first (see ``world.captions``).

    ``group`` names a pair of values: of a held-out row the pair that holds it out, else of the parts that pairs are
    held out of first. So no group is in two splits.
    """

    url: str
    captions: tuple[str, ...]
    group: str
    split: str
    license: str
    attribution: str


def drawing_rows(subset: str) -> list[DrawingRow]:
    """Lists a subset in its fixed order. Raises UserError for another name, or if the demo packages are missing."""
    if subset not in SUBSETS:
        raise UserError(f"drawings:{subset}: no such subset; choose one of {', '.join(SUBSETS)}, flawed")
    require_packages()
    return [_row(drawing) for drawing in islice(_drawings(), SUBSETS[subset])]


def drawings_fingerprint() -> str:
    """Returns what the lists depend on: their version and those of the packages.

    Raises UserError if a package is missing.
    """
    require_packages()
    return " ".join(
        [f"drawings {VERSION}", *(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES.values())]
    )


def _drawings() -> Iterator[Drawing]:
    """Yields different drawings without end, each style as often as its share says."""
    seen: set[Drawing] = set()
    for number in map(str, count()):
        at = hash_fraction("style", number)
        style = next(style for style, end in _STYLES.items() if at < end)
        parts = PARTS[style].items()
        drawing = Drawing(style, tuple(_pick(list(values), style, part, number) for part, values in parts))
        if drawing not in seen:
            seen.add(drawing)
            yield drawing


def _pick(values: list[str], *what: str) -> str:
    return values[int(len(values) * hash_fraction(*what))]


def _row(drawing: Drawing) -> DrawingRow:
    split, group = _split(drawing)
    side = 1024 if hash_fraction("side", drawing.style, *drawing.values) < _LARGE else 256
    attribution = f'"{drawing.style.capitalize()}" by DiceBear (www.dicebear.com), CC0 1.0'
    return DrawingRow(drawing_url(drawing, side), captions(drawing), group, split, LICENSE, attribution)


def _split(drawing: Drawing) -> tuple[str, str]:
    parts = drawing.parts
    for split, kinds in _HELD_OUT.items():
        for kind in kinds[drawing.style]:
            pair = tuple(parts[part] for part in kind)
            if pair == held_out_pair(split, drawing.style, kind):
                return split, _group(drawing.style, kind, pair)
    kind = _HELD_OUT["test"][drawing.style][0]
    return "train", _group(drawing.style, kind, tuple(parts[part] for part in kind))


def _group(style: str, kind: tuple[str, str], pair: tuple[str, ...]) -> str:
    return f"{style}: " + ", ".join(f"{part} {value}" for part, value in zip(kind, pair, strict=True))


@cache
def held_out_pair(split: str, style: str, kind: tuple[str, str]) -> tuple[str, ...]:
    """Returns the two values that hold out a row which has both, such as "bell" and "crown" of body and top."""
    pairs = sorted(
        product(*(PARTS[style][part] for part in kind)), key=lambda pair: hash_fraction("held out", style, *kind, *pair)
    )
    return pairs[list(_HELD_OUT).index(split)]
