"""The rows that an evaluation looks at: held out, kept by curation, always the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.sampling_config import BASE
from models.tokens import tokenize
from pipeline.data.pairs.row_index import Place
from pipeline.data.source.stage import row_key, shard_of
from pipeline.evaluate.captions import Phrases
from pipeline.evaluate.metrics import derangement
from pipeline.graph.artifacts import Artifact, ShardList, read_table
from pipeline.held_out import FEWEST, HELD_OUT_SPLITS
from pipeline.store import Store
from pipeline.training.feed.tables import JoinedRow, Tables
from pipeline.training.feed.views import Views
from pipeline.training.task import Batch

COLUMNS = ("image", "tokens", "image_embedding", "text_embedding")
LOOKED = 1024
GALLERY = 500  # real images among which the right one is looked for
Tick = Callable[[str], None]  # tells the progress
TRAINING_ROWS = 16_384  # at most, for the codes' frequencies and the nearest training image


@dataclass(frozen=True)
class HeldOut:
    """Rows of one split: held out, or training rows that stand beside these.

    ``batch``: "tokens" int64 [n, 77], "image_embedding" and "text_embedding" fp32 [n, d] of unit norm and, for
    images, "image" uint8 [n, 3, s, s]. ``groups``: of the source, else the row's own key; rows of one are alike, so
    intervals are over groups. ``captions``: the first of each row, which is the one that was embedded.
    ``licenses``: of the images, None where unknown. ``other``: another row for each row, int64 [n].
    """

    split: str
    keys: list[str]
    groups: list[str]
    captions: list[str]
    licenses: list[str | None]
    batch: Batch
    other: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> HeldOut:
        """Returns the same on a device."""
        batch = {name: column.to(device) for name, column in self.batch.items()}
        return replace(self, batch=batch, other=self.other.to(device))

    def first(self, rows: int) -> HeldOut:
        """Returns the first ``rows`` of them (two or more), with other rows among themselves."""
        batch = {name: column[:rows] for name, column in self.batch.items()}
        other = derangement(self.captions[:rows]).to(self.other.device)
        kept = {name: getattr(self, name)[:rows] for name in ("keys", "groups", "captions", "licenses")}
        return HeldOut(self.split, batch=batch, other=other, **kept)


def held_out(
    store: Store,
    inputs: Mapping[str, Artifact],
    rows: int,
    side: int = 0,
    prefer: Callable[[str], object] | None = None,
) -> HeldOut | int:
    """Returns the first ``rows`` test rows, or validation rows where there are fewer than FEWEST test rows.

    Where there are too few of both, it returns how many test rows there are.
    Rows with a short side below ``side`` are left out, and with a ``side`` images are read, as views of it. Those of
    the first LOOKED rows whose captions ``prefer`` likes come before the others. Raises CorruptObject for what cannot
    be trusted.
    """
    tables = Tables(store, inputs, COLUMNS, HELD_OUT_SPLITS[0], side)
    there = sum(tables.counts)
    for split in HELD_OUT_SPLITS:
        tables = tables.of(split)
        if sum(tables.counts) >= FEWEST:
            found = tables.first(max(LOOKED, rows) if prefer else rows)
            if prefer:
                found = sorted(found, key=lambda row: not prefer(_caption(row)))[:rows]
            return _join(store, inputs, split, found, side)
    return there


def named_rows(
    store: Store, inputs: Mapping[str, Artifact], phrases: Phrases, split: str, rows: int, side: int
) -> tuple[HeldOut, int] | int:
    """Returns rows of a split with images of ``side``, and how many of the first are to be drawn.

    These are at most ``rows``, whose captions differ in the name alone (see ``Phrases.in_frames``), of the first LOOKED
    rows or more. In all there are at most GALLERY, or those that are drawn: the others, in order, stand beside them
    when images are searched for. Captions with words of ``phrases.variants`` are left out. Where fewer than FEWEST are
    to be drawn, it returns how many.
    """
    found = Tables(store, inputs, COLUMNS, split, side).first(max(LOOKED, rows))
    found = [row for row in found if not phrases.is_variant(_caption(row))]
    chosen = phrases.in_frames([_caption(row) for row in found], rows)
    if len(chosen) < FEWEST:
        return len(chosen)
    ordered = [found[i] for i in chosen] + [row for i, row in enumerate(found) if i not in set(chosen)]
    return _join(store, inputs, split, ordered[: max(GALLERY, len(chosen))], side), len(chosen)


def _caption(row: JoinedRow) -> str:
    return (row.captions or [""])[0]


def _unit(rows: list[JoinedRow], name: str) -> Tensor:
    """Returns embeddings of unit norm, fp32 [n, d]."""
    return F.normalize(torch.from_numpy(np.stack([getattr(row, name) for row in rows])), dim=-1)


def _groups(store: Store, source: Artifact, keys: list[str]) -> list[str]:
    """Returns the group of each row that the source names, else its key."""
    shards, named = ShardList(store, source), dict[str, str | None]()
    for number in sorted({shard_of(key) for key in keys}):
        if shard := shards.find(number):
            groups = read_table(store, shard.blobs["refs"], ["group"])["group"].to_pylist()
            named |= {row_key(number, place): group for place, group in enumerate(groups)}
    return [named.get(key) or key for key in keys]


def _join(store: Store, inputs: Mapping[str, Artifact], split: str, rows: list[JoinedRow], side: int) -> HeldOut:
    captions = [_caption(row) for row in rows]
    batch: Batch = {"tokens": tokenize(captions)}
    for name in ("image_embedding", "text_embedding"):
        batch[name] = _unit(rows, name)
    if side:
        batch["image"] = read_views(store, [row.place for row in rows if row.place], side)
    keys, licenses = [row.key for row in rows], [row.license for row in rows]
    groups = _groups(store, inputs["source"], keys)
    return HeldOut(split, keys, groups, captions, licenses, batch, derangement(captions))


def read_views(store: Store, places: list[Place], side: int) -> Tensor:
    """Returns views of images, uint8 [n, 3, side, side]."""
    images = Views(store, side)
    return torch.from_numpy(np.stack([view.result() for view in images.views(places, images.fetch(places))]))


@dataclass(frozen=True)
class TrainingRows:
    """Holds the first training rows, at most TRAINING_ROWS.

    Attributes:
        places: Where their images lie.
        captions: The first of each.
        licenses: Of the images, None where unknown.
        image_embedding: fp32 [n, d] of unit norm.
        text_embedding: Of the first captions, fp32 [n, d] of unit norm.
    """

    places: list[Place]
    captions: list[str]
    licenses: list[str | None]
    image_embedding: Tensor
    text_embedding: Tensor


def training_rows(store: Store, inputs: Mapping[str, Artifact]) -> TrainingRows:
    """Returns kept training rows of which decoders learn, which held-out rows are compared with."""
    rows = Tables(store, inputs, COLUMNS, "train", BASE).first(
        TRAINING_ROWS
    )  # those that import embeddings have no side
    image, text = (_unit(rows, name) for name in ("image_embedding", "text_embedding"))
    places, captions = [row.place for row in rows if row.place], [_caption(row) for row in rows]
    return TrainingRows(places, captions, [row.license for row in rows], image, text)
