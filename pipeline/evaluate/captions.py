"""What a caption says apart from its style: name-alone and within-style choices, for captions of the emoji pictures.

Style and background words alone find a good part of the right captions, so that retrieval among whole captions flatters
a model that has learnt them and no names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.evaluate.images import named_background

STYLES = ("a flat twemoji picture of", "an openmoji drawing of")


class Parts(NamedTuple):
    """The words of a caption before its name, the name ("a cat face"), and those after it, "" for none."""

    style: str
    name: str
    background: str


def parts(caption: str) -> Parts | None:
    """Those of an emoji picture's caption; None for any other caption."""
    match = re.fullmatch(rf"({'|'.join(STYLES)}) (.+?)( on a pale \w+ background)?", caption)
    if match is None or (match[3] and named_background(caption) is None):
        return None
    return Parts(match[1], match[2], match[3] or "")


def within_style(own: Parts, names: Sequence[str]) -> list[str]:
    """Captions that differ from a row's in the name alone."""
    return [f"{own.style} {name}{own.background}" for name in names]
