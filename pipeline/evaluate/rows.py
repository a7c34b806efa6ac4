"""The rows of an evaluation: held out, kept by curation, always the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.tokens import tokenize
from pipeline.data.source.segments import row_key, shard_of
from pipeline.evaluate.statistics import derangement
from pipeline.graph.artifacts import Artifact, ShardList, read_table
from pipeline.held_out import FEWEST, HELD_OUT_SPLITS
from pipeline.store import Store
from pipeline.training.feed.tables import JoinedRow, Tables
from pipeline.training.feed.views import Views
from pipeline.training.task import Batch

COLUMNS = ("image", "tokens", "image_embedding", "text_embedding")
Tick = Callable[[str], None]  # shows progress


@dataclass(frozen=True)
class SplitRows:
    """Holds rows of one split.

    Attributes:
        split: Their split.
        keys: Keys of the rows.
        urls: References of the images, "" where the source has none.
        groups: Group of each row in the source, else the row's own key: rows of one are alike, so intervals are over
            groups.
        captions: First caption of each row, which is the one that was embedded.
        licenses: Licences of the images, None where unknown.
        batch: "tokens" int64 [n, 77], "image_embedding" and "text_embedding" fp32 [n, d] of unit norm and, for rows
            that are read with images, "image" uint8 [n, 3, s, s].
        other: Another row for each row, int64 [n].
    """

    split: str
    keys: list[str]
    urls: list[str]
    groups: list[str]
    captions: list[str]
    licenses: list[str | None]
    batch: Batch
    other: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> SplitRows:
        """Returns the same on a device."""
        batch = {name: column.to(device) for name, column in self.batch.items()}
        return replace(self, batch=batch, other=self.other.to(device))

    def first(self, rows: int) -> SplitRows:
        """Returns the first ``rows`` of them, two or more, with other rows among themselves."""
        batch = {name: column[:rows] for name, column in self.batch.items()}
        other = derangement(self.captions[:rows]).to(self.other.device)
        kept = {name: getattr(self, name)[:rows] for name in ("keys", "urls", "groups", "captions", "licenses")}
        return SplitRows(self.split, batch=batch, other=other, **kept)


def held_out(store: Store, inputs: Mapping[str, Artifact], rows: int, side: int = 0) -> SplitRows | int:
    """Returns the first ``rows`` test rows, or validation rows where there are fewer than FEWEST test rows.

    Where there are too few of both, it returns the number of test rows. With a ``side`` images are read as views of
    that side, and rows with a smaller short side are left out. Raises CorruptObject.
    """
    tables = Tables(store, inputs, COLUMNS, HELD_OUT_SPLITS[0], side)
    there = sum(tables.counts)
    for split in HELD_OUT_SPLITS:
        tables = tables.of(split)
        if sum(tables.counts) >= FEWEST:
            return _join(store, inputs, split, tables.first(rows), side)
    return there


def training_rows(store: Store, inputs: Mapping[str, Artifact], rows: int) -> SplitRows:
    """Returns the first ``rows`` training rows, two or more, without images."""
    return _join(store, inputs, "train", Tables(store, inputs, COLUMNS, "train", 0).first(rows), 0)


def _unit(rows: list[JoinedRow], name: str) -> Tensor:
    """Returns embeddings of unit norm, fp32 [n, d]."""
    return F.normalize(torch.from_numpy(np.stack([getattr(row, name) for row in rows])), dim=-1)


def _listed(store: Store, source: Artifact, keys: list[str]) -> list[tuple[str, str]]:
    """Returns the reference of each row's image in the source, and its group, or its key where it has none."""
    shards, found = ShardList(store, source), dict[str, tuple[str, str | None]]()
    for number in sorted({shard_of(key) for key in keys}):
        if shard := shards.find(number):
            table = read_table(store, shard.blobs["refs"], ["url", "group"]).to_pylist()
            found |= {row_key(number, place): (row["url"], row["group"]) for place, row in enumerate(table)}
    listed = [found.get(key, ("", None)) for key in keys]
    return [(url, group or key) for key, (url, group) in zip(keys, listed, strict=True)]


def _join(store: Store, inputs: Mapping[str, Artifact], split: str, rows: list[JoinedRow], side: int) -> SplitRows:
    captions = [(row.captions or [""])[0] for row in rows]
    batch: Batch = {"tokens": tokenize(captions)}
    for name in ("image_embedding", "text_embedding"):
        batch[name] = _unit(rows, name)
    if side:
        images = Views(store, side)
        places = [row.place for row in rows if row.place]
        views = [view.result() for view in images.views(places, images.fetch(places))]
        batch["image"] = torch.from_numpy(np.stack(views))
    keys, licenses = [row.key for row in rows], [row.license for row in rows]
    urls, groups = map(list, zip(*_listed(store, inputs["source"], keys), strict=True))
    return SplitRows(split, keys, urls, groups, captions, licenses, batch, derangement(captions))
