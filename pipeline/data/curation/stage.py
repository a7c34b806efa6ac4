"""Curation: removes rows that models should not be trained on, and never moves a row to another split.

It judges every row by itself, shard by shard, and then removes rows that are too near to others (see ``near_rows``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from pipeline.data.curation.rejected import Rejected, rejected_table
from pipeline.data.curation.row_filter import FilterRecipe, captioned_rows, reject_without_clip
from pipeline.data.embeddings.scores import score_column
from pipeline.data.neighbours.blocks import as_input
from pipeline.data.neighbours.work import PAIR_SECONDS, ROW_SECONDS, comparisons
from pipeline.data.pairs.row_index import index_counts, index_table
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, Shard, ShardRow, read_shards, read_table, write_table
from pipeline.graph.shards import map_shards, run_shards
from pipeline.graph.stages import Context, Stage, shard_key
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.progress import counted
from pipeline.settings import ShardSettings
from pipeline.store import Store
from pipeline.store.records import put_blob

READS = ("pairs", "captions", "embeddings")  # of which a shard has one each
Cosine = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class CurationRecipe(FilterRecipe):
    """Says which rows models are trained on; a CLIP trained on the list uses only the first four fields.

    Attributes:
        min_similarity: Minimum cosine of image and text embedding; -1 keeps all. The higher of this and the threshold
            from ``thresholds`` applies.
        min_score: Minimum score, by name of a head in ``embeddings.heads``.
        max_score: Maximum score, by name of a head in ``embeddings.heads``.
        near_duplicate: Cosine of image embeddings at which a row is a near-duplicate of an earlier one of its split;
            ``null`` turns it off, as in ``nano`` and ``tiny``.
        near_held_out: Cosine at which a training row is too near a held-out one; ``null`` turns it off, as in ``nano``
            and ``tiny``.
    """

    min_similarity: float = -1.0
    min_score: dict[str, float] = field(default_factory=dict)
    max_score: dict[str, float] = field(default_factory=dict)
    near_duplicate: Cosine | None = 0.96
    near_held_out: Cosine | None = 0.96


@dataclass(frozen=True)
class Judge:
    """Judges the rows of one shard."""

    store: Store
    recipe: CurationRecipe

    def __call__(self, task: ShardTask) -> ShardOutput:
        rows = captioned_rows(self.store, task.inputs["pairs"], task.inputs["captions"])
        named = {score_column(name) for name in (*self.recipe.min_score, *self.recipe.max_score)}
        columns = ["key", "similarity", *sorted(named)]
        scored = read_table(self.store, task.inputs["embeddings"].blobs["embeddings"], columns).to_pylist()
        scores = {row["key"]: row for row in scored}
        reasons = [self.reason(row, caption, scores[row["key"]]) for row, caption in rows]
        kept = [row for (row, _), reason in zip(rows, reasons, strict=True) if reason is None]
        lost = [Rejected(row["key"], why) for (row, _), why in zip(rows, reasons, strict=True) if why is not None]
        blobs = {"index": write_table(index_table(kept)), "rejected": rejected_table(lost)}
        return ShardOutput(Ledger.count(reasons), blobs, index_counts(kept))

    def reason(self, row: Mapping[str, Any], caption: str, scores: Mapping[str, Any]) -> str | None:
        """Returns why a row is rejected, or None.

        ``scores``: "similarity" and the columns of the heads that the recipe bounds.
        """
        r = self.recipe
        if known := reject_without_clip(r, row, caption):
            return known
        if scores["similarity"] < r.min_similarity:
            return "low_similarity"
        if any(scores[score_column(name)] < lowest for name, lowest in r.min_score.items()):
            return "low_score"
        return "high_score" if any(scores[score_column(n)] > highest for n, highest in r.max_score.items()) else None


@dataclass(frozen=True)
class Cull:
    """Removes the rows that are too near to others from one judged shard."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        judged = task.inputs["judged"]
        index = read_table(self.store, judged.blobs["index"]).to_pylist()
        near, before = (
            [Rejected(**row) for row in read_table(self.store, blob).to_pylist()]
            for blob in (task.inputs["near"].blobs["near"], judged.blobs["rejected"])
        )
        gone = {row.key for row in near}
        kept = [row for row in index if row["key"] not in gone]
        blobs = {"index": write_table(index_table(kept)), "rejected": rejected_table(before + near)}
        reasons = Counter(row.reason for row in before + near)
        return ShardOutput(Ledger(len(kept), dict(reasons)), blobs, index_counts(kept))


def run_curation(ctx: Context) -> Artifact:
    """Judges every shard, then removes rows that are too near to others."""
    shards = {name: {s.number: s for s in read_shards(ctx.store, ctx.inputs[name])} for name in READS}
    recipe, whole = ctx.recipe, {}
    if frozen := ctx.inputs.get("thresholds"):
        recipe = replace(recipe, min_similarity=max(recipe.min_similarity, frozen.metrics["min_similarity"]))
        whole = {"thresholds": frozen.key}  # which decides over the rows of every shard, so it is in each one's key
    tasks = []
    for number in sorted(shards["pairs"]):
        inputs = {name: of_stage[number] for name, of_stage in shards.items()}
        tasks.append(ShardTask(number, shard_key(ctx, {n: s.key for n, s in inputs.items()} | whole), inputs))
    rows = sum(s.kept for s in shards["pairs"].values())
    judge = partial(Judge, ctx.store, recipe)
    if ctx.recipe.near_duplicate is None and ctx.recipe.near_held_out is None:
        return map_shards(ctx, tasks, judge, "rows", rows)
    judged, _ = run_shards(ctx, tasks, judge, "rows", rows, "curation judgements")
    tasks = _culls(ctx, judged, shards["embeddings"])
    return map_shards(ctx, tasks, partial(Cull, ctx.store), "rows", rows)


def _culls(ctx: Context, judged: Sequence[Shard], embeddings: Mapping[int, ShardRow]) -> list[ShardTask]:
    """Makes a task for each judged shard, whose key depends on the near rows found in it.

    So appended rows leave a shard as it is unless they are near to its rows.
    """
    from pipeline.data.curation.near_rows import find_near_rows

    nothing = put_blob(ctx.store, rejected_table([]))
    rows = [as_input(shard) for shard in judged]
    near = find_near_rows(ctx, rows, embeddings)
    tasks = []
    for shard in rows:
        found = near.get(shard.number, nothing)
        inputs = {"judged": shard, "near": ShardRow(shard.number, found, 0, 0, {"near": found}, {})}
        tasks.append(ShardTask(shard.number, shard_key(ctx, {n: s.key for n, s in inputs.items()}), inputs))
    return tasks


def _inputs(_: Stage, config: Any) -> tuple[str, ...]:
    return (*READS, "thresholds") if config.thresholds.similarity else READS


def _fits(stage: Stage, config: Any) -> None:
    for bound in ("min_score", "max_score"):
        for name in getattr(stage.recipe, bound):
            if name not in config.embeddings.heads:
                raise UserError(f"curation.{bound}.{name}: embeddings.heads has no {name}; name its file there")


def _warn(stage: Stage, found: Any) -> Iterator[str]:
    most = stage.recipe.max_caption
    if long := found.captions_above(most):
        yield (
            f"{long:,} of {counted(found.rows, 'pair')} have a first caption of more than {most:,} characters and will "
            "be left out; raise curation.max_caption or shorten them"
        )


def _row_seconds(recipe: CurationRecipe, rows: float) -> float:
    near = recipe.near_duplicate is not None or recipe.near_held_out is not None
    return ROW_SECONDS + near * comparisons(rows) * PAIR_SECONDS


CURATION = Stage(
    "curation",
    version=3,
    recipe=CurationRecipe,
    inputs=READS,
    needs=_inputs,
    run=run_curation,
    settings=ShardSettings,
    fits=_fits,
    warn=_warn,
    counts_list=True,
    row_seconds=_row_seconds,
)
