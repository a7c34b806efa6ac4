"""The index: finds the curated images nearest to an embedding, for audits and for search by caption.

A small set keeps its vectors unchanged, in faiss indices of each block of shards, one for each split: answers are
exact, and appended rows leave the blocks before them as they are. A large set keeps codes in one inverted file (IVF-PQ;
Jégou et al., 2011), made again when rows are appended; a search reads the few lists that are near to its query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from pipeline.data.neighbours.work import INDEXED_SECONDS, coding_seconds
from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Context, Stage
from pipeline.settings import ShardSettings


@dataclass(frozen=True)
class IndexRecipe:
    """Says how the search index stores embeddings.

    Attributes:
        flat_rows: Training rows up to which embeddings are stored unquantised and results are exact; above, they are
            stored as IVF-PQ codes (one byte per 8 components), and results are approximate.
    """

    flat_rows: Annotated[int, Field(ge=256)] = 1 << 20  # a byte of a code is fitted to 256 rows or more


def run_index(ctx: Context) -> Artifact:
    """Indexes the image embeddings of all curated rows."""
    from pipeline.data.neighbours.indices import make_indices

    return make_indices(ctx)


def _row_seconds(recipe: IndexRecipe, rows: float) -> float:
    return coding_seconds(rows) if rows > recipe.flat_rows else INDEXED_SECONDS


INDEX = Stage(
    "index",
    version=3,
    recipe=IndexRecipe,
    inputs=("embeddings", "curation"),
    run=run_index,
    settings=ShardSettings,
    row_seconds=_row_seconds,
    # float16, or of many a code of a byte for 8 components and a number, twice: before lists are merged, and merged
    row_bytes=lambda recipe, rows, dim: 2 * dim if rows <= recipe.flat_rows else 2 * (dim / 8 + 8),
)
