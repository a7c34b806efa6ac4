"""The work that requests ask for. Imports no torch: the gateway needs none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Row:
    """One image to draw; ``share`` is how far it is turned, where a kind turns images."""

    caption: str | None
    seed: int
    share: float = 0.0


@dataclass(frozen=True)
class Work:
    """Images of one kind with equal settings.

    Attributes:
        kind: generation, inpainting, variation, difference or interpolation.
        options: Sampling options that differ from the bundle's.
        side: Side of the images to hand out, in pixels; 512 is drawn larger and resized.
        rows: The images.
        images: PNG files as ``decoding.prepare`` makes them, and of the mask.
        more: Further inputs of the kind: eta of a variation, the caption before a difference.
        partial: Smaller images are handed out, too.
    """

    kind: str
    options: Mapping[str, Any]
    side: int
    rows: tuple[Row, ...]
    images: tuple[bytes, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False

    @cached_property
    def digests(self) -> list[str]:
        """Returns the sha256 of each of ``images``, which may be large."""
        return [hashlib.sha256(image).hexdigest() for image in self.images]


def drawn_side(side: int) -> int:
    """Returns the side of the smallest of the cascade's images that is not below ``side``."""
    return min(drawn for drawn in (64, 256, 1024) if drawn >= side)
