"""Fetches and packs the images of a sample as the pairs stage would, and judges them by the rules that need no CLIP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.config import Config
from pipeline.data.curation.row_filter import reject_without_clip
from pipeline.data.pairs.row_index import STAGE_SIDES
from pipeline.data.pairs.stage import packing
from pipeline.data.source.segments import row_key
from pipeline.data.source.source import ListRow
from pipeline.graph.artifacts import ShardRow, read_table, write_table
from pipeline.graph.workers import ShardTask
from pipeline.store import Store
from pipeline.store.records import digest, put_blob

REFERENCE = ("url", "split", "sha256", "license", "attribution", "reject")  # columns that a Packer reads


@dataclass(frozen=True)
class SampledImages:
    """Holds what became of a sample of rows.

    Attributes:
        shard: Shard of pairs that they make, in the store.
        rows: Rows of its index.
        captions: First captions, by key.
        unfit: Reasons why curation will reject rows that pairs keeps, by key, as far as that needs no CLIP.
    """

    shard: ShardRow
    rows: list[dict[str, Any]]
    captions: Mapping[str, str]
    unfit: Mapping[str, str]

    @property
    def kept(self) -> list[dict[str, Any]]:
        """Returns the rows that pairs keeps."""
        return [row for row in self.rows if row["status"] == "kept"]


@dataclass(frozen=True)
class ImageLook:
    """Holds what the images of a sample are like.

    Attributes:
        rows: Rows, drawn from the whole list, whose images were asked for.
        kept: Rows whose image can be used.
        short_sides: Their images by short side as stored, pixels.
        reaching: Their images whose short side is at least 64, 256 and 1024 px, which the models of these sizes need.
        equal: Images that an earlier one of them equals to the byte, as stored.
    """

    rows: int
    kept: int
    short_sides: Mapping[int, int]
    reaching: Mapping[int, int]
    equal: int


def pack_sample(config: Config, store: Store, rows: Sequence[ListRow]) -> SampledImages:
    """Returns what the pairs stage makes of rows: fetched with the same rules and bounds, in a shard of their own.

    Raises UserError as that stage does.
    """
    rows = [replace(row, split=row.split or config.source.split_of(row.group or row.url)) for row in rows]
    table = {name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in REFERENCE}
    refs = put_blob(store, write_table(table))
    listed = ShardRow(0, refs, len(rows), 0, {"refs": refs}, {})
    with packing(store, config.pairs, config.run.pairs, config.source) as pack:
        made = pack(shares=False)(ShardTask(0, digest(["look", refs]), {"source": listed}))
    blobs = {name: put_blob(store, data) for name, data in made.blobs.items()}
    made.finished()
    shard = ShardRow(0, refs, made.ledger.kept, made.ledger.rows - made.ledger.kept, blobs, dict(made.counts))
    index = read_table(store, blobs["index"]).to_pylist()
    captions = {row_key(0, i): row.captions[0] if row.captions else "" for i, row in enumerate(rows)}
    judged = {
        row["key"]: reject_without_clip(config.curation, row, captions[row["key"]])
        for row in index
        if row["status"] == "kept"
    }
    return SampledImages(shard, index, captions, {key: reason for key, reason in judged.items() if reason})


def look_at_images(sample: SampledImages) -> ImageLook:
    """Returns what the images of a sample are like."""
    kept = sample.kept
    sides = Counter(min(row["width"], row["height"]) for row in kept)
    reaching = {side: sum(n for short, n in sides.items() if short >= side) for side in STAGE_SIDES if side}
    equal = len(kept) - len({row["sha256"] for row in kept})
    return ImageLook(len(sample.rows), len(kept), dict(sorted(sides.items())), reaching, equal)
