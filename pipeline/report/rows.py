"""Reads rows of a few shards as the report shows them: what each stage says of them, and their images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.data.pairs.row_index import Place, read_images
from pipeline.graph.artifacts import Artifact
from pipeline.graph.shard_tables import ShardRow, read_shards, read_table
from pipeline.report.html import attempt
from pipeline.report.images import Album
from pipeline.store import Store

SHARDS_READ = 3

Artifacts = Mapping[str, Artifact]


@dataclass(frozen=True)
class PairsShard:
    """Holds one shard of pairs.

    Attributes:
        shard: its entry in the table of shards.
        rows: every row of its index.
        kept: the keys of the rows that are kept so far.
        captions: the first caption by key.
        reasons: why curation rejected a row, by key.
    """

    shard: ShardRow
    rows: list[dict[str, Any]]
    kept: set[str]
    captions: dict[str, str]
    reasons: dict[str, str]

    @property
    def kept_rows(self) -> list[dict[str, Any]]:
        """Returns the index rows that are kept so far."""
        return [row for row in self.rows if row["key"] in self.kept]


class Thumbnail(NamedTuple):
    """A row's image, what is said of it, and its caption."""

    image: Markup
    said: str
    caption: str


def read_first_shards(store: Store, artifacts: Artifacts) -> list[PairsShard]:
    """Returns the first shards of pairs, beginning with those that keep any row."""
    shards = numbered(store, artifacts, "pairs")
    left = {number: shard.kept for number, shard in {**shards, **numbered(store, artifacts, "curation")}.items()}
    first = sorted(shards.values(), key=lambda s: left[s.number] == 0)
    return list(read_pairs(store, artifacts, first[:SHARDS_READ]))


def read_worst_shards(store: Store, artifacts: Artifacts) -> list[PairsShard]:
    """Returns the shards of pairs that have lost most rows, without those that have lost none."""
    shards = numbered(store, artifacts, "pairs")
    lost = Counter({number: shard.lost for number, shard in shards.items()})
    lost.update({number: shard.lost for number, shard in numbered(store, artifacts, "curation").items()})
    worst = sorted((s for s in shards.values() if lost[s.number]), key=lambda s: -lost[s.number])
    return list(read_pairs(store, artifacts, worst[:SHARDS_READ]))


def read_pairs(store: Store, artifacts: Artifacts, shards: Iterable[ShardRow]) -> Iterator[PairsShard]:
    """Yields each of ``shards`` of pairs, with what later stages say of its rows."""
    curated = numbered(store, artifacts, "curation")
    captioned = numbered(store, artifacts, "captions")
    for shard in shards:
        rows = read_table(store, shard.blobs["index"]).to_pylist()
        kept = {row["key"] for row in rows if row["status"] == "kept"}
        captions: dict[str, str] = {}
        reasons: dict[str, str] = {}
        if shard.number in curated:
            blobs = curated[shard.number].blobs
            kept = set(read_table(store, blobs["index"], ["key"])["key"].to_pylist())
            reasons = {row["key"]: row["reason"] for row in read_table(store, blobs["rejected"]).to_pylist()}
        if shard.number in captioned:
            table = read_table(store, captioned[shard.number].blobs["captions"]).to_pylist()
            captions = {row["key"]: row["captions"][0] for row in table if row["captions"]}
        yield PairsShard(shard, rows, kept, captions, reasons)


def numbered(store: Store, artifacts: Artifacts, stage: str) -> dict[int, ShardRow]:
    """Returns the shards of a stage by number; none before it is made."""
    return {shard.number: shard for shard in read_shards(store, artifacts[stage])} if stage in artifacts else {}


def thumbnail(store: Store, shard: PairsShard, row: Mapping[str, Any], album: Album, said: str = "") -> Thumbnail:
    """Returns a row's image, small, or one line that says why it cannot be shown."""
    caption = shard.captions.get(row["key"], "")

    def image() -> Markup:
        [data] = read_images(store, [Place.of(row, shard.shard.blobs.get("images"))])
        return album.image(data, 160, caption or f"row {row['key']}", most=14_000)

    return Thumbnail(attempt(f"Row {row['key']}", image), said, caption)
