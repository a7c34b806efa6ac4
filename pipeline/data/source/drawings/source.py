"""The drawings as a list of the quick start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from pipeline.data.source.drawings.flaws import flawed_rows
from pipeline.data.source.drawings.listing import drawing_rows, drawings_fingerprint
from pipeline.data.source.drawings.server import serving
from pipeline.data.source.drawings.world import HOST
from pipeline.data.source.reader import ListReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListRow, Source


class Drawings(Source):
    """A subset of the drawings, as ``drawings:SUBSET``, which a server on this machine draws on demand."""

    prefixes, everywhere, host = ("drawings:",), True, HOST
    credits = "Images: the styles Critters, Sprouts and Planets by DiceBear (CC0 1.0)."

    def fingerprint(self) -> Any:
        return [*self.path.split(":", 1), drawings_fingerprint()]

    def rows(self, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        _, subset = self.path.split(":", 1)
        found = flawed_rows() if subset == "flawed" else drawing_rows(subset)
        for url, captions, group, split, *rights in found:
            yield ListRow(url, tuple(filter(None, captions)), group, split, "", *rights)

    def serving(self) -> AbstractContextManager[str]:
        return serving()
