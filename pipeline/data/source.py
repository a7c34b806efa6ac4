"""The user's list, cut into shards that never move.

A list is an ordered sequence of segments (files, folders, tars, or the emoji set), each cut in its own order into
shards of N rows. Appending a segment, or rows at the end of the last one, leaves every full shard as it was. Rows to
be tried again are segments too; a row to be forgotten leaves an empty place.

A source shard has two keys: one over its number and image references, one over its captions, so that new captions
never download a picture again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice

from pipeline.artifacts import Artifact, Shard, publish_artifact, read_table, write_shard_table, write_table
from pipeline.data.journal import NOTHING, Journal, read_journal, reference_mark
from pipeline.data.lists import Row, fingerprint, read_rows
from pipeline.errors import UserError
from pipeline.graph import Context
from pipeline.ledger import Ledger
from pipeline.records import create_record, digest, put_blob, read_record
from pipeline.store import Store

VERSION = 1
SEGMENT_SHARDS = 100_000  # shard numbers a segment may use: number = segment * SEGMENT_SHARDS + place
FIRST_RETRY = 500  # the segment of the first rows that are tried again; those before are the list's own
LAST_SEGMENT = 999  # a shard's number has eight digits


@dataclass(frozen=True)
class SourceRecipe:
    """Where pairs come from. ``paths``: .parquet, .csv, .tsv, a folder of a.jpg + a.txt, one of embeddings as
    clip-retrieval writes them, .tar, or ``emoji:SUBSET``.

    A row's split is its ``split_column`` if the list has one, else a hash of its ``group_column``, else of its image
    reference; ``validation`` and ``test`` are the shares held out by hash.
    """

    paths: tuple[str, ...]
    image_column: str = "url"
    caption_column: str = "caption"
    group_column: str = "group"
    split_column: str = "split"
    hash_column: str = "sha256"
    shard_rows: int = 1000
    validation: float = 0.02
    test: float = 0.02

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths: empty; name at least one list")
        if len(self.paths) > FIRST_RETRY:
            raise ValueError(f"paths: {len(self.paths)} lists; at most {FIRST_RETRY}, so put some into one")
        if not 1 <= self.shard_rows <= 10_000:
            raise ValueError(f"shard_rows: {self.shard_rows} is outside 1..10000")
        if self.validation < 0 or self.test < 0 or self.validation + self.test >= 1:
            raise ValueError("validation and test: shares of at least 0 that leave rows to train on")


@dataclass(frozen=True)
class SourceShard:
    """One shard of the list, with the key of its references and the key of its captions."""

    number: int
    image_key: str
    caption_key: str
    ledger: Ledger
    refs: str = ""
    captions: str = ""


@dataclass(frozen=True)
class Scan:
    """All shards of a list, and the two source keys."""

    shards: list[SourceShard] = field(default_factory=list)

    @property
    def keys(self) -> dict[str, str]:
        return {
            "source": digest(["source", VERSION, [s.image_key for s in self.shards]]),
            "captions": digest(["captions", VERSION, [s.caption_key for s in self.shards]]),
        }


def scan(recipe: SourceRecipe, store: Store, write: bool, journal: Journal = NOTHING) -> Scan:
    """Read the list and cut it into shards. With ``write``, store them; a segment stored before is not read again.

    Raises UserError if a list is missing, unreadable, empty or lacks a column.
    """
    shards: list[SourceShard] = []
    seen: set[bytes] = set()  # references of earlier rows; 8 bytes of hash each
    columns = [recipe.image_column, recipe.caption_column, recipe.group_column, recipe.split_column, recipe.hash_column]
    cut = [recipe.shard_rows, recipe.validation, recipe.test]
    before = ""
    for index, path in enumerate(recipe.paths):
        before = digest(
            ["segment", VERSION, before, fingerprint(path), columns, *cut, *_forgotten_later(journal, index)]
        )
        found = _stored(store, before)
        if found is None:
            for earlier in recipe.paths[:index] if not seen else ():
                seen.update(_reference_hash(row.url) for row in read_rows(earlier, recipe))
            rows = read_rows(path, recipe)
            found = _store(store, before, _cut(index, rows, recipe, seen, journal, store if write else None), write)
            if not found:
                raise UserError(f"source {path}: no rows")
        shards += found
    for index, blob in enumerate(journal.retries, FIRST_RETRY):
        name = digest(["retry", VERSION, index, blob, *cut, *_forgotten_later(journal, index)])
        found = _stored(store, name)
        if found is None:
            again = (Row(**{**row, "captions": tuple(row["captions"])}) for row in read_table(store, blob).to_pylist())
            found = _store(store, name, _cut(index, again, recipe, set(), journal, store if write else None), write)
        shards += found
    return Scan(shards)


def _forgotten_later(journal: Journal, segment: int) -> list[list[str]]:
    hits = journal.hits(segment)
    return [hits] if hits else []


def _stored(store: Store, name: str) -> list[SourceShard] | None:
    record = read_record(store, f"shards/source/segment-{name}.json")
    if record is None:
        return None
    return [SourceShard(**{**s, "ledger": Ledger.from_json(s["ledger"])}) for s in record["shards"]]


def _store(store: Store, name: str, cut: Iterator[SourceShard], write: bool) -> list[SourceShard]:
    found = list(cut)
    if write and found:
        body = {"shards": [{**asdict(s), "ledger": s.ledger.as_json()} for s in found]}
        create_record(store, f"shards/source/segment-{name}.json", body)
    return found


def _cut(
    segment: int, rows: Iterator[Row], recipe: SourceRecipe, seen: set[bytes], journal: Journal, store: Store | None
) -> Iterator[SourceShard]:
    forgotten = journal.marks
    for place in range(SEGMENT_SHARDS):
        block = list(islice(rows, recipe.shard_rows))
        if not block:
            return
        yield _shard(segment * SEGMENT_SHARDS + place, block, recipe, seen, forgotten, store)
    raise UserError(f"source: over {SEGMENT_SHARDS:,} shards in one segment; raise source.shard_rows")


def _shard(
    number: int,
    rows: list[Row],
    recipe: SourceRecipe,
    seen: set[bytes],
    forgotten: frozenset[str],
    store: Store | None,
) -> SourceShard:
    refs, captions, rejects = [], [], []
    for row in rows:
        mark = _reference_hash(row.url)
        reject = "no_reference" if not row.url else "duplicate_url" if mark in seen else None
        seen.add(mark)
        # Of rows that are tried again, only those have no reference that were blanked.
        if reference_mark(row.url) in forgotten or (not row.url and segment_of(number) >= FIRST_RETRY):
            row, reject = Row("", ()), "forgotten"
        rejects.append(reject)
        captions.append(row.captions)
        split = row.split or split_by_hash(row.group or row.url, recipe.validation, recipe.test)
        refs.append((row.url, row.group, split, row.sha256, row.license, row.attribution, reject))
    columns = ("url", "group", "split", "sha256", "license", "attribution", "reject")
    blobs = {"refs": "", "captions": ""}
    if store is not None:
        import pyarrow as pa

        table = {name: pa.array([ref[i] for ref in refs], pa.string()) for i, name in enumerate(columns)}
        blobs["refs"] = put_blob(store, write_table(table))
        keys = pa.array([row_key(number, i) for i in range(len(rows))], pa.string())
        blobs["captions"] = put_blob(
            store, write_table({"key": keys, "captions": pa.array(captions, pa.list_(pa.string()))})
        )
    return SourceShard(
        number,
        digest(["refs", VERSION, number, refs]),
        digest(["captions", VERSION, number, captions]),
        Ledger.count(rejects),
        **blobs,
    )


def segment_of(number: int) -> int:
    """The segment of a shard."""
    return number // SEGMENT_SHARDS


def row_key(number: int, place: int) -> str:
    """The key of a row, 12 digits: 8 for the shard's number, 4 for the place in it (img2dataset's scheme)."""
    return f"{number:08d}{place:04d}"


def split_by_hash(value: str, validation: float, test: float) -> str:
    """'test', 'validation' or 'train', by the value alone: a split never moves."""
    share = int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big") / 2**64
    return "test" if share < test else "validation" if share < test + validation else "train"


def _reference_hash(url: str) -> bytes:
    return hashlib.blake2b(url.encode(), digest_size=8).digest()


# --- stages -----------------------------------------------------------------------------------------------------------


def run_source(ctx: Context) -> Artifact:
    """Store the references of every shard."""
    return _publish(ctx, "refs", "image_key")


def run_captions(ctx: Context) -> Artifact:
    """Store the captions of every shard."""
    return _publish(ctx, "captions", "caption_key")


def _publish(ctx: Context, blob: str, key: str) -> Artifact:
    found = scan(ctx.recipe, ctx.store, write=True, journal=read_journal(ctx.store, ctx.config.project))
    if found.keys[ctx.stage] != ctx.key:
        raise UserError("the list, or what is to be tried again or forgotten, has changed since the plan; run again")
    shards = [Shard(s.number, getattr(s, key), s.ledger, {blob: getattr(s, blob)}) for s in found.shards]
    table, ledger = write_shard_table(ctx.store, shards)
    return publish_artifact(ctx.store, ctx.publishable(shard_table=table, ledger=ledger), seconds=0.0)
