"""Reads the rows to train on: an index joined with captions and embeddings, shard by shard and key by key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import lru_cache
from itertools import islice, repeat
from threading import Lock
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.pairs.row_index import Place
from pipeline.data.source.stage import CAPTIONED, has_caption
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, ShardList, read_shards, read_table
from pipeline.store import Store

CACHED = 8  # shards
SHARD_READERS = 8  # shards that are read at once to count their rows
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
    """

    key: str
    place: Place | None
    captions: list[str] | None
    image_embedding: np.ndarray | None
    text_embeddings: np.ndarray | None
    license: str | None

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

    Rows are those of "curation", or of "pairs" when CLIP trains, before the curation. ``counts`` are rows by position
    in ``shards``; ``without_caption`` counts the rows that ``captioned`` leaves out.

    Args:
        store: Store of the tables.
        inputs: Input artefacts of the stage.
        columns: Columns of a batch, which decide whether "pairs", "captions" and "embeddings" are read.
        split: "train", "validation" or "test".
        min_side: Least shorter side of an image, in pixels.
        cached: Number of shards that stay in memory.
        captioned: Leaves out rows without a caption.
    """

    def __init__(
        self,
        store: Store,
        inputs: Mapping[str, Artifact],
        columns: Sequence[str],
        split: str,
        min_side: int,
        cached: int = CACHED,
        captioned: bool = False,
    ):
        self.store, self.columns, self.min_side, self.captioned = store, columns, min_side, captioned
        self.shards = ShardList(store, inputs["curation" if "curation" in inputs else "pairs"])
        wanted = {
            "pairs": "image" in columns,
            "captions": "tokens" in columns,
            "embeddings": not {"image_embedding", "text_embedding"}.isdisjoint(columns),
        }
        self._others = {name: ShardList(store, inputs[name]) for name in wanted if wanted[name]}
        self._choose(split, cached)

    def _choose(self, split: str, cached: int) -> None:
        self.split = split
        self._listed = self.counts = tuple(self.shards.counts(f"{split}/{self.min_side}").tolist())
        if self.captioned:
            with ThreadPoolExecutor(SHARD_READERS) as readers:
                self.counts = tuple(readers.map(self._captioned, range(len(self.shards))))
        self.without_caption = sum(self._listed) - sum(self.counts)
        self._shard = lru_cache(maxsize=cached)(self._read_shard)
        self._locks = [Lock() for _ in range(LOCKS)]

    def of(self, split: str) -> Tables:
        """Returns the tables of another split, which share the lists of shards."""
        other = copy(self)
        other._choose(split, CACHED)
        return other

    def first(self, rows: int) -> list[JoinedRow]:
        """Returns at most ``rows`` rows, in order of shards and of the index."""
        everything = ((shard, row) for shard, count in enumerate(self.counts) for row in range(count))
        return self.read(list(islice(everything, rows)))

    def read(self, positions: Sequence[tuple[int, int]]) -> list[JoinedRow]:
        """Returns rows by (position of the shard, row in it), in that order.

        Every shard is opened once, also where several threads ask for it.
        """
        opened = {}
        for shard in sorted({shard for shard, _ in positions}):
            with self._locks[shard % LOCKS]:
                opened[shard] = self._shard(shard)
        return [opened[shard][row] for shard, row in positions]

    def blobs(self, position: int) -> dict[str, Mapping[str, str]]:
        """Returns the blobs of a shard by stage: "rows" first, then the tables that are joined with it."""
        shard = self.shards[position]
        found = {name: listed.find(shard.number) for name, listed in self._others.items()}
        return {"rows": shard.blobs} | {name: other.blobs for name, other in found.items() if other is not None}

    def _captioned(self, position: int) -> int:
        """Returns how many rows of a shard have a caption. Reads the shard only if some rows have none."""
        listed = self._others["captions"].find(self.shards[position].number)
        if not self._listed[position] or (listed and listed.counts.get(CAPTIONED) == listed.kept + listed.lost):
            return self._listed[position]
        return self._rows(position).num_rows

    def _rows(self, position: int) -> pa.Table:
        """Returns the wanted rows of a shard's index. Raises ValueError where its artefact counts other rows."""
        number, blobs = self.shards[position].number, self.blobs(position)
        index = self._index(blobs["rows"]["index"])
        if index.num_rows != self._listed[position]:
            raise ValueError(
                f"shard {number}: its index has {index.num_rows} {self.split} rows of {self.min_side} px, "
                f"its artefact counts {self._listed[position]}"
            )
        if not self.captioned:
            return index
        captions = self._join(number, blobs, "captions", index["key"].to_pylist())["captions"].to_pylist()
        return index.filter(pa.array([has_caption(each) for each in captions], pa.bool_()))

    def _read_shard(self, position: int) -> list[JoinedRow]:
        number, blobs = self.shards[position].number, self.blobs(position)
        index = self._rows(position)
        keys = index["key"].to_pylist()
        places: Iterator[Place | None] = repeat(None, len(keys))
        captions: Iterable[list[str] | None] = repeat(None, len(keys))
        image: Iterable[np.ndarray | None] = repeat(None, len(keys))
        text: Iterable[np.ndarray | None] = repeat(None, len(keys))
        if "pairs" in blobs:
            columns = (index[name].to_pylist() for name in ("tar", "offset", "size", "sha256"))
            own = blobs["pairs"].get("images")
            places = (
                None if size is None else Place(key, own, tar, offset, size, sha256)
                for key, tar, offset, size, sha256 in zip(keys, *columns, strict=True)
            )
        if "captions" in blobs:
            captions = self._join(number, blobs, "captions", keys)["captions"].to_pylist()
        if "embeddings" in blobs:
            table = self._join(number, blobs, "embeddings", keys)
            if "image_embedding" in self.columns:
                image = _matrix(table["image_embedding"])
            if "text_embedding" in self.columns:
                text = _by_row(_matrix(table["text_embedding"]), table["more_text_embeddings"].combine_chunks())
        licenses = index["license"].to_pylist()
        return [JoinedRow(*values) for values in zip(keys, places, captions, image, text, licenses, strict=True)]

    def _index(self, blob: str) -> pa.Table:
        index = read_table(self.store, blob)
        wanted = pc.and_(pc.equal(index["status"], "kept"), pc.equal(index["split"], self.split))
        if self.min_side:
            short = pc.min_element_wise(index["width"], index["height"])
            wanted = pc.and_(wanted, pc.greater_equal(short, self.min_side))
        return index.filter(wanted)

    def _join(self, number: int, blobs: Mapping[str, Mapping[str, str]], name: str, keys: list[str]) -> pa.Table:
        """Returns the rows of a shard's table by their keys, in that order. Raises ValueError if one is missing."""
        table = read_table(self.store, blobs[name][name])
        found = pc.index_in(pa.array(keys, pa.string()), value_set=table["key"])
        if found.null_count:
            missing = next(key for key, place in zip(keys, found.to_pylist(), strict=True) if place is None)
            raise ValueError(f"shard {number}: row {missing} is in the index but not in its {name}")
        return table.take(found)


def embedding_dim(store: Store, embeddings: Artifact) -> int:
    """Returns the dimension d of an embeddings artefact, which is CLIP's. Raises UserError if it has no rows."""
    for shard in read_shards(store, embeddings):
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
