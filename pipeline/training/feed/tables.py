"""Reads the rows to train on: an index joined with captions and embeddings, shard by shard and key by key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from itertools import repeat
from threading import Lock
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.pairs.row_index import Place
from pipeline.data.source.rows import MADE, MADE_SHARE
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, ShardList, read_table
from pipeline.store import Store

CACHED = 8  # shards
LOCKS = 64  # of shards that are being read; shards with the same lock wait for each other


class JoinedRow(NamedTuple):
    """Holds one example before decoding. Fields that the columns do not name are None.

    Attributes:
        key: Key of the row.
        place: Place of the encoded image; None also where embeddings were imported without an image.
        captions: Captions of the row, all of them.
        image_embedding: fp32 [d].
        text_embeddings: fp32 [n, d] of the first n captions, or of an empty caption where the row has none.
        license: Licence of the image; None where the list names none.
        first_share: Share of draws that take the first caption; None where all captions are drawn alike.
    """

    key: str
    place: Place | None
    captions: list[str] | None
    image_embedding: np.ndarray | None
    text_embeddings: np.ndarray | None
    license: str | None
    first_share: float | None = None

    def pick(self, choice: int) -> int:
        """Returns the caption that a random number of 63 bits picks; 0 picks the first."""
        if self.first_share is None or self.versions == 1:
            return choice % self.versions
        # The lower half decides whether it is the first, the upper half which of the others.
        others, low = divmod(choice, 1 << 32)
        return 0 if low < self.first_share * (1 << 32) else 1 + others % (self.versions - 1)

    @property
    def versions(self) -> int:
        """Returns how many captions to choose from: those that were embedded if embeddings are read, else all."""
        return len(self.captions or [""]) if self.text_embeddings is None else len(self.text_embeddings)

    @property
    def text_embedding(self) -> np.ndarray | None:
        """Returns the embedding of the first caption, fp32 [d]."""
        return None if self.text_embeddings is None else self.text_embeddings[0]


class Tables:
    """Reads the kept rows of one split whose shorter side is at least ``min_side``, by shard.

    Rows are those of "curation", or of "filter" when CLIP trains, before the curation.

    Args:
        store: Store of the tables.
        inputs: Input artefacts of the stage.
        columns: Columns of a batch, which decide whether "pairs", "captions" and "embeddings" are read.
        split: "train", "validation" or "test".
        min_side: Least shorter side of an image, in pixels.
        cached: Number of shards that stay in memory.
    """

    counts: tuple[int, ...]
    """Rows by position in ``shards``."""

    def __init__(
        self,
        store: Store,
        inputs: Mapping[str, Artifact],
        columns: Sequence[str],
        split: str,
        min_side: int,
        cached: int = CACHED,
    ):
        self.store, self.columns, self.min_side = store, columns, min_side
        rows = "curation" if "curation" in inputs else "filter"
        self.shards = ShardList(store, inputs[rows])
        self._made_share = inputs["captions"].metrics.get(MADE_SHARE) if "captions" in inputs else None
        wanted = {
            "pairs": "image" in columns,
            "captions": "tokens" in columns or self._made_share is not None,
            "embeddings": not {"image_embedding", "text_embedding"}.isdisjoint(columns),
        }
        self._others = {name: ShardList(store, inputs[name]) for name in wanted if wanted[name]}
        self._choose(split, cached)

    def _choose(self, split: str, cached: int) -> None:
        self.split = split
        self.counts = tuple(self.shards.counts(f"{split}/{self.min_side}").tolist())
        self._shard = lru_cache(maxsize=cached)(self._read_shard)
        self._locks = [Lock() for _ in range(LOCKS)]

    def of(self, split: str) -> Tables:
        """Returns the tables of another split, which share the lists of shards."""
        other = copy(self)
        other._choose(split, CACHED)
        return other

    def first(self, rows: int) -> list[JoinedRow]:
        """Returns at most ``rows`` rows, in order of shards and of the index. Reads no shard behind them."""
        found: list[JoinedRow] = []
        for shard, count in enumerate(self.counts):
            if len(found) >= rows:
                break
            if count:
                found += self._opened(shard)[: rows - len(found)]
        return found

    def read(self, positions: Sequence[tuple[int, int]]) -> list[JoinedRow]:
        """Returns rows by (position of the shard, row in it), in that order.

        Every shard is opened once, also where several threads ask for it.
        """
        opened = {shard: self._opened(shard) for shard in sorted({shard for shard, _ in positions})}
        return [opened[shard][row] for shard, row in positions]

    def _opened(self, shard: int) -> list[JoinedRow]:
        with self._locks[shard % LOCKS]:
            return self._shard(shard)

    def blobs(self, position: int) -> dict[str, Mapping[str, str]]:
        """Returns the blobs of a shard by stage: "rows" first, then the tables that are joined with it."""
        shard = self.shards[position]
        found = {name: listed.find(shard.number) for name, listed in self._others.items()}
        return {"rows": shard.blobs} | {name: other.blobs for name, other in found.items() if other is not None}

    def _read_shard(self, position: int) -> list[JoinedRow]:
        number, blobs = self.shards[position].number, self.blobs(position)
        index = self._index(blobs["rows"]["index"])
        if index.num_rows != self.counts[position]:
            raise ValueError(
                f"shard {number}: its index has {index.num_rows} {self.split} rows of {self.min_side} px, "
                f"its artefact counts {self.counts[position]}"
            )
        keys = index["key"].to_pylist()
        places: Iterator[Place | None] = repeat(None, len(keys))
        captions: Iterable[list[str] | None] = repeat(None, len(keys))
        image: Iterable[np.ndarray | None] = repeat(None, len(keys))
        text: Iterable[np.ndarray | None] = repeat(None, len(keys))
        shares: Iterable[float | None] = repeat(None, len(keys))
        if "pairs" in blobs:
            where = (index[name].to_pylist() for name in ("tar", "offset", "size", "sha256"))
            own = blobs["pairs"].get("images")
            places = (
                None if size is None else Place(key, own, tar, offset, size, sha256)
                for key, tar, offset, size, sha256 in zip(keys, *where, strict=True)
            )
        if "captions" in blobs:
            table = self._join(number, blobs, "captions", index["key"])
            captions = table["captions"].to_pylist()
            if self._made_share is not None:
                shares = [self._made_share if made else None for made in table[MADE].to_pylist()]
        if "embeddings" in blobs:
            table = self._join(number, blobs, "embeddings", index["key"])
            if "image_embedding" in self.columns:
                image = _matrix(table["image_embedding"])
            if "text_embedding" in self.columns:
                text = _by_row(_matrix(table["text_embedding"]), table["more_text_embeddings"].combine_chunks())
        licenses = index["license"].to_pylist()
        columns = (keys, places, captions, image, text, licenses, shares)
        return [JoinedRow(*values) for values in zip(*columns, strict=True)]

    def _index(self, blob: str) -> pa.Table:
        index = read_table(self.store, blob)
        wanted = pc.and_(pc.equal(index["status"], "kept"), pc.equal(index["split"], self.split))
        if self.min_side:
            short = pc.min_element_wise(index["width"], index["height"])
            wanted = pc.and_(wanted, pc.greater_equal(short, self.min_side))
        return index.filter(wanted)

    def _join(self, number: int, blobs: Mapping[str, Mapping[str, str]], name: str, keys: pa.ChunkedArray) -> pa.Table:
        """Returns the rows of a shard's table by their keys, in that order. Raises ValueError if one is missing."""
        table = read_table(self.store, blobs[name][name])
        found = pc.index_in(keys.combine_chunks(), value_set=table["key"])
        if found.null_count:
            missing = keys.filter(found.is_null())[0].as_py()
            raise ValueError(f"shard {number}: row {missing} is in the index but not in its {name}")
        return table.take(found)


def embedding_dim(store: Store, embeddings: Artifact) -> int:
    """Returns the dimension d of an embeddings artefact, which is CLIP's. Raises UserError if it has no rows."""
    shards = ShardList(store, embeddings)
    for shard in map(shards.__getitem__, range(len(shards))):  # not rows(): of thousands the first will do
        if shard.kept:
            return len(read_table(store, shard.blobs["embeddings"], ["image_embedding"])["image_embedding"][0])
    raise UserError("embeddings: no rows to train on; see why the pairs were rejected")


def _by_row(first: np.ndarray, more: pa.ListArray) -> list[np.ndarray]:
    """Returns embeddings fp32 [n, d] of each row, from that of its first caption and the list of the others."""
    ends = np.cumsum(more.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
    flat = more.flatten().flatten().to_numpy(zero_copy_only=False)
    others = flat.astype(np.float32).reshape(-1, first.shape[1])
    return [
        np.concatenate([row[None], part]) if len(part) else row[None]
        for row, part in zip(first, np.split(others, ends[:-1]), strict=True)
    ]


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Returns a column of lists of one length as fp32 [rows, d]."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32).reshape(len(column), -1)
