"""Reads rows of a few shards as the report shows them: what each stage says of them, and their images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.build import STAGES
from pipeline.data.pairs.decoding import shared_decoder
from pipeline.data.pairs.image import IN_PLACE_PIXELS, Storing
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.graph.artifacts import Artifact, ShardRow
from pipeline.ledger import REASONS
from pipeline.report.html import attempt
from pipeline.report.inputs import ReportInput

LISTED = tuple(stage.name for stage in STAGES if stage.counts_list)
SHARDS_READ = 3
THUMBNAIL = Storing(160, "png", 1, "keep_ratio_largest")


@dataclass(frozen=True)
class PairsShard:
    """Holds one shard of pairs.

    Attributes:
        shard: Entry in the table of shards.
        rows: Rows of its index, all of them.
        kept: Keys of the rows that are kept so far.
        captions: First caption by key.
        reasons: Reasons why curation rejected rows, by key.
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


class LostRows(NamedTuple):
    """Rows that a stage rejected, or deferred, for one reason, and the rows that it looked at."""

    stage: str
    reason: str
    deferred: bool
    number: int
    rows: int

    @property
    def share(self) -> str:
        """Returns how much of the stage's rows they are."""
        return f"{self.number / max(self.rows, 1):.1%}"


def lost_rows(artifacts: Mapping[str, Artifact]) -> list[LostRows]:
    """Returns what was rejected or deferred, by stage and reason, each row once."""
    found = []
    seen: dict[tuple[int, bool], Counter[str]] = defaultdict(Counter)
    for stage, artifact in artifacts.items():
        ledger = artifact.ledger
        for deferred, counts in ((False, ledger.rejected), (True, ledger.deferred)):
            # Stages that count the same rows, such as all of the list, count the same rejects again.
            own = Counter(counts) - seen[ledger.rows, deferred]
            seen[ledger.rows, deferred] += own
            found += [LostRows(stage, reason, deferred, count, ledger.rows) for reason, count in own.most_common()]
    return found


def read_first_shards(given: ReportInput) -> list[PairsShard]:
    """Returns the first shards of pairs, beginning with those that keep any row."""
    shards = given.shards("pairs")
    left = {number: shard.kept for number, shard in {**shards, **given.shards("curation")}.items()}
    first = sorted(shards.values(), key=lambda s: left[s.number] == 0)  # a stable sort: each half stays in order
    return list(read_pairs(given, first[:SHARDS_READ]))


def read_worst_shards(given: ReportInput) -> list[PairsShard]:
    """Returns the shards of pairs that have lost most rows, without those that have lost none."""
    shards = given.shards("pairs")
    lost = Counter({number: shard.lost for number, shard in shards.items()})
    lost.update({number: shard.lost for number, shard in given.shards("curation").items()})
    worst = sorted((s for s in shards.values() if lost[s.number]), key=lambda s: -lost[s.number])
    return list(read_pairs(given, worst[:SHARDS_READ]))


def read_pairs(given: ReportInput, shards: Iterable[ShardRow]) -> Iterator[PairsShard]:
    """Yields each of ``shards`` of pairs, with what later stages say of its rows."""
    curated = given.shards("curation")
    captioned = given.shards("captions")
    for shard in shards:
        rows = given.table(shard.blobs["index"]).to_pylist()
        kept = {row["key"] for row in rows if row["status"] == "kept"}
        captions: dict[str, str] = {}
        reasons: dict[str, str] = {}
        if shard.number in curated:
            blobs = curated[shard.number].blobs
            kept = set(given.table(blobs["index"], ["key"])["key"].to_pylist())
            reasons = {row["key"]: row["reason"] for row in given.table(blobs["rejected"]).to_pylist()}
        if shard.number in captioned:
            table = given.table(captioned[shard.number].blobs["captions"]).to_pylist()
            captions = {row["key"]: row["captions"][0] for row in table if row["captions"]}
        yield PairsShard(shard, rows, kept, captions, reasons)


def thumbnail(given: ReportInput, shard: PairsShard, row: Mapping[str, Any], said: str = "") -> Thumbnail:
    """Returns a row's image, small, or one line that says why it cannot be shown."""
    caption = shard.captions.get(row["key"], "")

    def image() -> Markup:
        place = Place.of(row, shard.shard.blobs.get("images"))
        [data] = read_images(given.store, [place])
        if place.in_place:  # the pairs left the user's own file where it is: no stage has decoded or bounded it yet
            found = shared_decoder().prepare(data, IN_PLACE_PIXELS, THUMBNAIL)
            if isinstance(found, str):
                raise ValueError(REASONS[found])
            data = found.data
        return given.album.image(data, THUMBNAIL.image_size, caption or f"row {row['key']}", most=14_000)

    return Thumbnail(attempt(f"Row {row['key']}", image), said, caption)
