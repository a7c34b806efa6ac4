"""Counts over every row of a list as it is cut into shards, and draws some rows at random, in bounded memory."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.data.curation.row_filter import FilterRecipe, reject_without_clip
from pipeline.data.embeddings.parts import EMBEDDED_CAPTIONS
from pipeline.data.source.source import ListRow
from pipeline.local import is_embedding

DRAWN = 10_000  # rows whose captions are read in detail
HASHED = 1_000_000  # first captions among which equal ones are counted, 8 bytes each
LICENSES = 1000  # that are told apart
OTHER = "others"
NO_IMAGE = {"width": None}  # a row that caption rules judge


class ListSurvey:
    """Takes the rows of a list in order, each with how it was rejected.

    Attributes:
        rows: Rows of the list.
        lost: Rows that are rejected as the list is read, by reason.
        kept: All other rows, of which the following are counts.
        licenses: Rows by licence, "" for none.
        captionless: Rows without a caption.
        unfit: Rows that curation will reject for their first caption, by reason.
    """

    def __init__(self, recipe: FilterRecipe):
        self._recipe = recipe
        self.rows = self.kept = self.captionless = 0
        self.lost, self.licenses, self.unfit = Counter[str](), Counter[str](), Counter[str]()
        self._hashes = array("q")
        self._drawn: list[ListRow] = []
        self._chance = random.Random(0)

    def add(self, row: ListRow) -> None:
        """Counts a row."""
        self.rows += 1
        if row.reject:
            self.lost[row.reject] += 1
            return
        kept = self.kept
        self.kept += 1
        told = row.license in self.licenses or len(self.licenses) < LICENSES
        self.licenses[row.license if told else OTHER] += 1
        caption = row.captions[0] if row.captions else ""
        self.captionless += not caption
        if reason := reject_without_clip(self._recipe, NO_IMAGE, caption):
            self.unfit[reason] += 1
        if caption and len(self._hashes) < HASHED:
            self._hashes.append(hash(caption))
        # Reservoir sampling (Vitter 1985): every row so far is drawn with the same chance.
        place = kept if kept < DRAWN else self._chance.randrange(kept + 1)
        if place < DRAWN:
            self._drawn[place : place + 1] = [replace(row, captions=row.captions[:EMBEDDED_CAPTIONS])]

    @property
    def hashed(self) -> int:
        """Returns the first captions among which equal ones are counted."""
        return len(self._hashes)

    @property
    def repeated(self) -> int:
        """Returns how many of these an earlier row has, too."""
        return len(self._hashes) - len(np.unique(np.frombuffer(self._hashes, np.int64)))

    @property
    def drawn(self) -> Sequence[ListRow]:
        """Returns the rows that are drawn, in no order."""
        return self._drawn

    def pictured(self, count: int) -> list[ListRow]:
        """Returns ``count`` of the drawn rows that name an image, or all of them, in the order of ``drawn``."""
        pictured = [i for i, row in enumerate(self._drawn) if not is_embedding(row.url)]
        chosen = random.Random(1).sample(pictured, min(count, len(pictured)))
        return [self._drawn[i] for i in sorted(chosen)]
