"""The rows that teach: an index joined with captions and embeddings, shard number by shard number and key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice, repeat
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from pipeline.artifacts import Artifact, ShardRow, read_shards, read_table
from pipeline.errors import UserError
from pipeline.store import Store


class Place(NamedTuple):
    """Where a picture's bytes lie: in the tar blob ``images`` of its shard, or in the user's own file ``tar``."""

    key: str
    images: str | None
    tar: str | None
    offset: int
    size: int
    sha256: str


class Row(NamedTuple):
    """One example before decoding; what the columns do not ask for is None, and so is ``place`` where embeddings were
    imported without a picture. ``image_embedding`` is fp32 [d],
    ``text_embeddings`` fp32 [n, d] of the first n captions, or of an empty one where there is none. ``license`` is the
    picture's, None where the list names none."""

    key: str
    place: Place | None
    captions: list[str] | None
    image_embedding: np.ndarray | None
    text_embeddings: np.ndarray | None
    license: str | None

    @property
    def versions(self) -> int:
        """Captions to choose from: those that were embedded, if embeddings are read, and all otherwise."""
        return len(self.captions or [""]) if self.text_embeddings is None else len(self.text_embeddings)

    @property
    def text_embedding(self) -> np.ndarray | None:
        """Of the first caption, fp32 [d]."""
        return None if self.text_embeddings is None else self.text_embeddings[0]


class Tables:
    """The kept rows of one split whose short side is at least ``min_side``, by shard.

    Rows are those of "curation", or of "pairs" before there is a curation, when CLIP trains. ``inputs`` are the
    stage's input artefacts; of "pairs", "captions" and "embeddings" only those that ``columns`` ask for are read.
    ``cached`` shards stay in memory. ``counts`` are rows by position in ``shards``.
    """

    def __init__(
        self,
        store: Store,
        inputs: Mapping[str, Artifact],
        columns: Sequence[str],
        split: str,
        min_side: int,
        cached: int = 8,
    ):
        def by_number(name: str, wanted: bool) -> dict[int, ShardRow]:
            return {shard.number: shard for shard in read_shards(store, inputs[name])} if wanted else {}

        self.store, self.columns, self.split, self.min_side = store, columns, split, min_side
        self.shards = read_shards(store, inputs["curation" if "curation" in inputs else "pairs"])
        self.counts = tuple(shard.counts.get(f"{split}/{min_side}", 0) for shard in self.shards)
        self._pairs = by_number("pairs", "image" in columns)
        self._captions = by_number("captions", "tokens" in columns)
        self._embeddings = by_number("embeddings", not {"image_embedding", "text_embedding"}.isdisjoint(columns))
        self._shard = lru_cache(maxsize=cached)(self._read_shard)
        self._locks: dict[int, Lock] = {}

    def first(self, rows: int) -> list[Row]:
        """At most ``rows`` rows, in order of shards and of the index."""
        everything = ((shard, row) for shard, count in enumerate(self.counts) for row in range(count))
        return self.read(list(islice(everything, rows)))

    def read(self, positions: Sequence[tuple[int, int]]) -> list[Row]:
        """Rows by (position of the shard, row in it), in that order; every shard is opened once, also where several
        threads ask for it."""
        opened = {}
        for shard in sorted({shard for shard, _ in positions}):
            with self._locks.setdefault(shard, Lock()):
                opened[shard] = self._shard(shard)
        return [opened[shard][row] for shard, row in positions]

    def _read_shard(self, position: int) -> list[Row]:
        shard = self.shards[position]
        index = self._index(shard)
        if index.num_rows != self.counts[position]:
            raise ValueError(
                f"shard {shard.number}: its index has {index.num_rows} {self.split} rows of {self.min_side} px, "
                f"its artefact counts {self.counts[position]}"
            )
        keys = index["key"].to_pylist()
        places: Iterator[Place | None] = repeat(None, len(keys))
        captions: Any = repeat(None, len(keys))
        image: Any = repeat(None, len(keys))
        text: Any = repeat(None, len(keys))
        if pairs := self._pairs.get(shard.number):
            columns = (index[name].to_pylist() for name in ("tar", "offset", "size", "sha256"))
            own = pairs.blobs.get("images")
            places = (
                None if size is None else Place(key, own, tar, offset, size, sha256)
                for key, tar, offset, size, sha256 in zip(keys, *columns, strict=True)
            )
        if captioned := self._captions.get(shard.number):
            captions = self._join(captioned, "captions", keys)["captions"].to_pylist()
        if embedded := self._embeddings.get(shard.number):
            table = self._join(embedded, "embeddings", keys)
            if "image_embedding" in self.columns:
                image = _matrix(table["image_embedding"])
            if "text_embedding" in self.columns:
                text = _by_row(_matrix(table["text_embedding"]), table["more_text_embeddings"].combine_chunks())
        licenses = index["license"].to_pylist()
        return [Row(*values) for values in zip(keys, places, captions, image, text, licenses, strict=True)]

    def _index(self, shard: ShardRow) -> Any:
        import pyarrow.compute as pc

        index = read_table(self.store, shard.blobs["index"])
        wanted = pc.and_(pc.equal(index["status"], "kept"), pc.equal(index["split"], self.split))
        if self.min_side:
            short = pc.min_element_wise(index["width"], index["height"])
            wanted = pc.and_(wanted, pc.greater_equal(short, self.min_side))
        return index.filter(wanted)

    def _join(self, shard: ShardRow, blob: str, keys: list[str]) -> Any:
        """The rows of a shard's table whose keys are ``keys``, in that order. Raises ValueError if one is missing."""
        import pyarrow as pa
        import pyarrow.compute as pc

        table = read_table(self.store, shard.blobs[blob])
        found = pc.index_in(pa.array(keys, pa.string()), value_set=table["key"])
        if found.null_count:
            missing = next(key for key, place in zip(keys, found.to_pylist(), strict=True) if place is None)
            raise ValueError(f"shard {shard.number}: row {missing} is in the index but not in its {blob}")
        return table.take(found)


def embedding_dim(store: Store, embeddings: Artifact) -> int:
    """The dimension d of an embeddings artefact, which is CLIP's. Raises UserError if it has no rows."""
    for shard in read_shards(store, embeddings):
        if shard.kept:
            return len(read_table(store, shard.blobs["embeddings"], ["image_embedding"])["image_embedding"][0])
    raise UserError("embeddings: no rows, so there is nothing to train on; see why the pairs were rejected")


def _by_row(first: np.ndarray, more: Any) -> list[np.ndarray]:
    """Embeddings fp32 [n, d] of each row, from those of its first caption and the lists of the others."""
    ends = np.cumsum(more.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
    flat = more.flatten().flatten().to_numpy(zero_copy_only=False)
    others = flat.astype(np.float32).reshape(-1, first.shape[1])
    return [
        np.concatenate([row[None], part]) if len(part) else row[None]
        for row, part in zip(first, np.split(others, ends[:-1]), strict=True)
    ]


def _matrix(column: Any) -> np.ndarray:
    """A column of lists of one length as fp32 [rows, d]."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32).reshape(len(column), -1)
