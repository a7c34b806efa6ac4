"""Reads pairs for programs: the rows of a split with their captions, embeddings and stored images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline.data.curation.stage import READS
from pipeline.data.fetch.references import shown
from pipeline.data.pairs.decoding import read_pair_pixels
from pipeline.data.pairs.row_index import SPLITS, Place, read_images
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, ShardList, read_table
from pipeline.store import Store

CACHED = 4  # shards whose tables stay in memory
TOGETHER = 64  # rows whose images are read, and are in memory, at once
FACTS = ("key", "url", "width", "height", "split", "license", "attribution")
VECTORS = ("image_embedding", "text_embedding")


@dataclass(frozen=True, eq=False)
class Pair:
    """Holds one image with its captions.

    Attributes:
        key: Key of the row: its shard and its place in it.
        url: URL of the image, as listed, without a password.
        width: Width of the stored image, in pixels; None where embeddings were imported without an image.
        height: Height of the stored image, likewise.
        split: "train", "validation" or "test".
        license: Licence of the image; None where the list names none.
        attribution: Name to credit; None where the list names nobody.
        captions: Captions of the row, all of them.
        data: The stored file; None where embeddings were imported without an image.
        in_place: The file lies in a tar of the user's: others have made it, so a child process decodes it.
        image_embedding: float16 [d], unit norm, where embeddings were asked for.
        text_embedding: Embedding of the first caption, likewise.
    """

    key: str
    url: str
    width: int | None
    height: int | None
    split: str
    license: str | None
    attribution: str | None
    captions: list[str]
    data: bytes | None = field(repr=False)
    in_place: bool
    image_embedding: np.ndarray | None = field(repr=False, default=None)
    text_embedding: np.ndarray | None = field(repr=False, default=None)

    @property
    def caption(self) -> str:
        """Returns the first caption, "" where there is none."""
        return self.captions[0] if self.captions else ""

    @cached_property
    def image(self) -> Image.Image:
        """Returns the image, upright RGB.

        Raises UserError where embeddings were imported without it, and where it cannot be read.
        """
        if self.data is None:
            raise UserError(f"row {self.key} has imported embeddings and no image; read its embeddings instead")
        return Image.fromarray(read_pair_pixels(self.key, self.data, None, in_place=self.in_place))


class _ShardTables(NamedTuple):
    """Holds the tables of a shard's pairs, row by row, and the blob of its images."""

    index: pa.Table
    captions: pa.ChunkedArray
    vectors: dict[str, pa.ChunkedArray]
    images: str | None


class PairReader:
    """Reads the pairs of one split, or of all, shard by shard. It can be pickled.

    Args:
        store: Holds them.
        inputs: The artefacts "pairs" and "captions"; with "curation" curated rows only; "embeddings" to read these.
            Others are passed over.
        split: "train", "validation" or "test"; None reads all.

    Raises:
        UserError: for an unknown split.
    """

    def __init__(self, store: Store, inputs: Mapping[str, Artifact], split: str | None = None):
        if split not in (None, *SPLITS):
            raise UserError(f"split {split!r}: use one of {', '.join(SPLITS)}, or none for all")
        self.store, self.split = store, split
        self.rows = ShardList(store, inputs["curation" if "curation" in inputs else "pairs"])
        self._joined = {name: ShardList(store, inputs[name]) for name in READS if name in inputs}

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return int(self.ends[-1]) if self.shards else 0

    @cached_property
    def ends(self) -> np.ndarray:
        """Returns the number of pairs up to the end of each shard, int64 [shards]."""
        counts = [self.rows.counts(f"{split}/0") for split in SPLITS if self.split in (None, split)]
        return np.cumsum(np.sum(counts, axis=0))

    @property
    def embedded(self) -> bool:
        """Returns whether pairs are read with their embeddings."""
        return "embeddings" in self._joined

    @property
    def shards(self) -> int:
        """Returns the number of shards."""
        return len(self.rows)

    def read(self, position: int, places: Sequence[int] | None = None) -> Iterator[list[Pair]]:
        """Yields the pairs of a shard, some at a time, in the order of the list, or those at ``places`` among them.

        Raises CorruptObject.
        """
        tables = _tables(self, position)
        index, captions, vectors = tables.index, tables.captions, tables.vectors
        if places is not None:
            index, captions = index.take(places), captions.take(places)
            vectors = {name: column.take(places) for name, column in vectors.items()}
        for start in range(0, index.num_rows, TOGETHER):
            rows = index.slice(start, TOGETHER).to_pylist()
            texts = captions.slice(start, TOGETHER).to_pylist()
            stored = [Place.of(row, tables.images) for row in rows if row["size"] is not None]
            images = dict(zip((place.key for place in stored), read_images(self.store, stored), strict=True))
            for row, text in zip(rows, texts, strict=True):
                row |= {"captions": text, "data": images.get(row["key"]), "url": shown(row["url"])}
                row["in_place"] = row["tar"] is not None
            for name, column in vectors.items():
                for row, value in zip(rows, column.slice(start, TOGETHER), strict=True):
                    row[name] = value.values.to_numpy(zero_copy_only=False)
            yield [Pair(**{field.name: row.get(field.name) for field in fields(Pair)}) for row in rows]

    def tables(self, position: int) -> _ShardTables:
        """Returns the tables of a shard's pairs. Raises CorruptObject."""
        shard = self.rows[position]
        blobs = {name: found.blobs for name, each in self._joined.items() if (found := each.find(shard.number))}
        index = read_table(self.store, shard.blobs["index"])
        wanted = pc.equal(index["status"], "kept")
        if self.split:
            wanted = pc.and_(wanted, pc.equal(index["split"], self.split))
        index = index.filter(wanted)
        captions = self._join(index, blobs["captions"]["captions"], ["captions"])["captions"]
        vectors: dict[str, pa.ChunkedArray] = {}
        if "embeddings" in blobs:
            joined = self._join(index, blobs["embeddings"]["embeddings"], list(VECTORS))
            vectors = {name: joined[name] for name in VECTORS}
        return _ShardTables(index, captions, vectors, blobs["pairs"].get("images"))

    def _join(self, index: pa.Table, blob: str, columns: list[str]) -> pa.Table:
        """Returns columns of a shard's table for the rows of an index. Raises ValueError where a row is missing."""
        table = read_table(self.store, blob, ["key", *columns])
        found = pc.index_in(index["key"], value_set=table["key"])
        if found.null_count:
            raise ValueError(f"{found.null_count} rows of the index are not in {columns[0]}")
        return table.take(found)


# Not a cache of each reader's: readers are pickled.
@lru_cache(CACHED)
def _tables(reader: PairReader, position: int) -> _ShardTables:
    return reader.tables(position)
