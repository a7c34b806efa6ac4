"""The filter: which rows their size and first caption alone rule out, so that no CLIP is trained on them.

A CLIP that is trained on the list reads what it keeps; curation judges by the same rules, whichever CLIP there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from pipeline.data.pairs.row_index import index_counts, index_table
from pipeline.data.source.rows import read_captions
from pipeline.graph.artifacts import Artifact, ShardRow, read_shards, read_table, write_table
from pipeline.graph.shards import map_shards
from pipeline.graph.stages import Context, Stage, shard_key
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.settings import ShardSettings
from pipeline.store import Store


@dataclass(frozen=True)
class FilterRecipe:
    """Says which rows are ruled out by their size and their first caption.

    Attributes:
        min_side: Minimum short side of the stored image in pixels.
        max_aspect: Maximum ratio of long to short side.
        min_caption: Minimum length of the first caption in characters.
        max_caption: Maximum length of the first caption in characters.
    """

    min_side: int = 64
    max_aspect: Annotated[float, Field(ge=1)] = 3.0
    min_caption: int = 1
    max_caption: int = 1000

    def __post_init__(self) -> None:
        if self.min_caption > self.max_caption:
            raise ValueError(f"min_caption: {self.min_caption} is above max_caption {self.max_caption}")


def reject_without_clip(recipe: FilterRecipe, row: Mapping[str, Any], caption: str) -> str | None:
    """Returns why a row is rejected by its stored size in pixels and its first caption alone, or None."""
    if row["width"] is not None:  # None: an imported embedding, without an image
        short, long = sorted((row["width"], row["height"]))
        if short < recipe.min_side:
            return "too_small"
        if long > recipe.max_aspect * short:
            return "bad_aspect"
    if not caption:
        return "no_caption"
    if len(caption) < recipe.min_caption:
        return "caption_too_short"
    return "caption_too_long" if len(caption) > recipe.max_caption else None


def captioned_rows(store: Store, pairs: ShardRow, captions: ShardRow) -> list[tuple[dict[str, Any], str]]:
    """Returns the kept rows of a shard's index, each with its first caption, "" without one."""
    texts = read_captions(store, captions)
    rows = [row for row in read_table(store, pairs.blobs["index"]).to_pylist() if row["status"] == "kept"]
    return [(row, next(iter(texts[row["key"]]), "")) for row in rows]


@dataclass(frozen=True)
class FilterRows:
    """Makes the index of the rows of one shard that the rules keep."""

    store: Store
    recipe: FilterRecipe

    def __call__(self, task: ShardTask) -> ShardOutput:
        rows = captioned_rows(self.store, task.inputs["pairs"], task.inputs["captions"])
        reasons = [reject_without_clip(self.recipe, row, caption) for row, caption in rows]
        kept = [row for (row, _), reason in zip(rows, reasons, strict=True) if reason is None]
        return ShardOutput(Ledger.count(reasons), {"index": write_table(index_table(kept))}, index_counts(kept))


def run_filter(ctx: Context) -> Artifact:
    """Judges every shard by itself."""
    captions = {shard.number: shard for shard in read_shards(ctx.store, ctx.inputs["captions"])}
    tasks = []
    for pairs in read_shards(ctx.store, ctx.inputs["pairs"]):
        inputs = {"pairs": pairs, "captions": captions[pairs.number]}
        tasks.append(ShardTask(pairs.number, shard_key(ctx, {n: s.key for n, s in inputs.items()}), inputs))
    rows = ctx.inputs["pairs"].ledger.kept
    return map_shards(ctx, tasks, partial(FilterRows, ctx.store, ctx.recipe), "rows", rows)


FILTER = Stage(
    "filter",
    version=1,
    recipe=FilterRecipe,
    inputs=("pairs", "captions"),
    run=run_filter,
    settings=ShardSettings,
    section="curation",
    on_demand=True,
    row_seconds=lambda *_: 5e-5,
)
