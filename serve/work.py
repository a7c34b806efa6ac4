"""The work that requests ask for. Imports no torch: the gateway needs none."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from pipeline.sampling.recipe import ImageRecipe, Row


@dataclass(frozen=True)
class Work:
    """Images of one operation with equal settings.

    Attributes:
        recipe: Operation, sampling options, and side of the images to hand out, in pixels.
        rows: The images.
        images: PNG files as ``decoding.prepare`` makes them, and of the mask.
        partial: Smaller images are handed out, too.
    """

    recipe: ImageRecipe
    rows: tuple[Row, ...]
    images: tuple[bytes, ...] = ()
    partial: bool = False

    @property
    def kind(self) -> str:
        """Returns the name of the operation."""
        return self.recipe.operation

    @property
    def settings(self) -> tuple[Any, ...]:
        """Returns what is equal of works that can be drawn together."""
        return self.recipe.operation, self.recipe.options, self.recipe.side

    @cached_property
    def digests(self) -> list[str]:
        """Returns the sha256 of each of ``images``, which may be large."""
        return [hashlib.sha256(image).hexdigest() for image in self.images]

    def identity(self, row: Row) -> dict[str, Any]:
        """Returns everything that an image depends on but the bundle."""
        return {**asdict(self.recipe.of(row)), "images": self.digests}
