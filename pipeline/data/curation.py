"""Which rows the models may learn from. Curation may remove rows, never move them to another split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.artifacts import Artifact, read_shards, read_table, write_table
from pipeline.data.index import index_counts, index_table
from pipeline.data.scores import score_column
from pipeline.graph import Context, shard_key
from pipeline.ledger import Ledger
from pipeline.shards import ShardOutput, ShardTask, map_shards
from pipeline.store import Store

VERSION = 2


@dataclass(frozen=True)
class CurationRecipe:
    """Thresholds. Sides are pixels of the stored picture, captions are judged by their first, in characters.

    ``min_score`` and ``max_score``: bounds on scores, by the name of a head of the embeddings.
    """

    min_side: int = 64
    max_aspect: float = 3.0
    min_caption: int = 1
    max_caption: int = 1000
    min_similarity: float = -1.0
    min_score: dict[str, float] = field(default_factory=dict)
    max_score: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_aspect < 1:
            raise ValueError(
                f"max_aspect: {self.max_aspect} would reject every picture; it is the long side over the short"
            )
        if self.min_caption > self.max_caption:
            raise ValueError(f"min_caption: {self.min_caption} is above max_caption {self.max_caption}")


@dataclass(frozen=True)
class Judge:
    """Judges the rows of one shard."""

    store: Store
    recipe: CurationRecipe

    def __call__(self, task: ShardTask) -> ShardOutput:
        table = read_table(self.store, task.inputs["pairs"].blobs["index"]).to_pylist()
        texts = dict(
            zip(*read_table(self.store, task.inputs["captions"].blobs["captions"]).to_pydict().values(), strict=True)
        )
        named = {score_column(name) for name in (*self.recipe.min_score, *self.recipe.max_score)}
        columns = ["key", "similarity", *sorted(named)]
        scored = read_table(self.store, task.inputs["embeddings"].blobs["embeddings"], columns).to_pylist()
        scores = {row["key"]: row for row in scored}
        rows = [row for row in table if row["status"] == "kept"]
        captions = [texts[row["key"]][0] if texts[row["key"]] else "" for row in rows]
        reasons = [self.reason(row, text, scores[row["key"]]) for row, text in zip(rows, captions, strict=True)]
        kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
        lost = {row["key"]: reason for row, reason in zip(rows, reasons, strict=True) if reason is not None}
        blobs = {"index": write_table(index_table(kept)), "rejected": write_table(_reasons(lost))}
        return ShardOutput(Ledger.count(reasons), blobs, index_counts(kept))

    def reason(self, row: Mapping[str, Any], caption: str, scores: Mapping[str, Any]) -> str | None:
        """Why a row is rejected, or None. ``scores``: "similarity" and the columns of the heads that are asked for."""
        r = self.recipe
        if row["width"] is not None:  # None: an imported embedding, whose picture nobody sees
            short, long = sorted((row["width"], row["height"]))
            if short < r.min_side:
                return "too_small"
            if long > r.max_aspect * short:
                return "bad_aspect"
        if not caption:
            return "no_caption"
        if len(caption) < r.min_caption:
            return "caption_too_short"
        if len(caption) > r.max_caption:
            return "caption_too_long"
        if scores["similarity"] < r.min_similarity:
            return "low_similarity"
        if any(scores[score_column(name)] < lowest for name, lowest in r.min_score.items()):
            return "low_score"
        return "high_score" if any(scores[score_column(n)] > highest for n, highest in r.max_score.items()) else None


def _reasons(lost: Mapping[str, str]) -> dict[str, Any]:
    """Columns of the rows that curation rejected."""
    import pyarrow as pa

    return {"key": pa.array(lost.keys(), pa.string()), "reason": pa.array(lost.values(), pa.string())}


@dataclass(frozen=True)
class MakeJudge:
    """Nothing to open: a judge needs only the store."""

    store: Store
    recipe: CurationRecipe

    def __call__(self) -> Judge:
        return Judge(self.store, self.recipe)


def run_curation(ctx: Context) -> Artifact:
    """Judge every shard."""
    names = ("pairs", "captions", "embeddings")
    shards = {name: {s.number: s for s in read_shards(ctx.store, ctx.inputs[name])} for name in names}
    tasks = []
    for number, pairs in sorted(shards["pairs"].items()):
        inputs = {"pairs": pairs, "captions": shards["captions"][number], "embeddings": shards["embeddings"][number]}
        tasks.append(ShardTask(number, shard_key(ctx, {n: s.key for n, s in inputs.items()}), inputs))
    rows = sum(s.kept for s in shards["pairs"].values())
    return map_shards(ctx, tasks, MakeJudge(ctx.store, ctx.recipe), "rows", rows)
