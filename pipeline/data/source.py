"""The user's list, cut into shards that never move.

A list is an ordered sequence of segments (files, folders, tars, or the emoji set), each cut in its own order into
shards of N rows. Appending a segment, or rows at the end of the last one, leaves every full shard as it was.

A source shard has two keys: one over its number and image references, one over its captions, so that new captions
never download a picture again.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.artifacts import Artifact, Shard, publish_artifact, write_shard_table, write_table
from pipeline.errors import UserError
from pipeline.graph import Context
from pipeline.ledger import Ledger
from pipeline.records import create_record, digest, put_blob, read_record
from pipeline.store import Store

VERSION = 1
SEGMENT_SHARDS = 100_000  # shard numbers a segment may use: number = segment * SEGMENT_SHARDS + place
IMAGES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class SourceRecipe:
    """Where pairs come from. ``paths``: .parquet, .csv, .tsv, a folder of a.jpg + a.txt, .tar, or ``emoji:SUBSET``.

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
        if not 1 <= self.shard_rows <= 10_000:
            raise ValueError(f"shard_rows: {self.shard_rows} is outside 1..10000")
        if self.validation < 0 or self.test < 0 or self.validation + self.test >= 1:
            raise ValueError("validation and test: shares of at least 0 that leave rows to train on")


@dataclass(frozen=True)
class Row:
    """One row of a list. ``url`` is an http(s) or file reference, or a member of a tar (see tar_reference)."""

    url: str
    captions: tuple[str, ...]
    group: str = ""
    split: str = ""
    sha256: str = ""
    license: str = ""
    attribution: str = ""


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


def scan(recipe: SourceRecipe, store: Store, write: bool) -> Scan:
    """Read the list and cut it into shards. With ``write``, store them; a segment stored before is not read again.

    Raises UserError if a list is missing, unreadable, empty or lacks a column.
    """
    shards: list[SourceShard] = []
    seen: set[bytes] = set()  # references of earlier rows; 8 bytes of hash each
    before = ""
    for index, path in enumerate(recipe.paths):
        cut = [recipe.image_column, recipe.caption_column, recipe.group_column, recipe.split_column, recipe.hash_column]
        before = digest(
            ["segment", VERSION, before, _fingerprint(path), cut, recipe.shard_rows, recipe.validation, recipe.test]
        )
        record_path = f"shards/source/segment-{before}.json"
        record = read_record(store, record_path)
        if record is None:
            for earlier in recipe.paths[:index] if not seen else ():
                seen.update(_reference_hash(row.url) for row in read_rows(earlier, recipe))
            found = list(_cut(index, read_rows(path, recipe), recipe, seen, store if write else None))
            if not found:
                raise UserError(f"source {path}: no rows")
            if write:
                record = create_record(
                    store, record_path, {"shards": [{**asdict(s), "ledger": s.ledger.as_json()} for s in found]}
                )
        else:
            found = [SourceShard(**{**s, "ledger": Ledger.from_json(s["ledger"])}) for s in record["shards"]]
        shards += found
    return Scan(shards)


def _cut(
    segment: int, rows: Iterator[Row], recipe: SourceRecipe, seen: set[bytes], store: Store | None
) -> Iterator[SourceShard]:
    for place in range(SEGMENT_SHARDS):
        block = list(islice(rows, recipe.shard_rows))
        if not block:
            return
        yield _shard(segment * SEGMENT_SHARDS + place, block, recipe, seen, store)
    raise UserError(f"source: over {SEGMENT_SHARDS:,} shards in one segment; raise source.shard_rows")


def _shard(number: int, rows: list[Row], recipe: SourceRecipe, seen: set[bytes], store: Store | None) -> SourceShard:
    refs, rejects = [], []
    for row in rows:
        mark = _reference_hash(row.url)
        reject = "no_reference" if not row.url else "duplicate_url" if mark in seen else None
        seen.add(mark)
        rejects.append(reject)
        split = row.split or split_by_hash(row.group or row.url, recipe.validation, recipe.test)
        refs.append((row.url, row.group, split, row.sha256, row.license, row.attribution, reject))
    captions = [row.captions for row in rows]
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


def row_key(number: int, place: int) -> str:
    """The key of a row, 12 digits: 8 for the shard's number, 4 for the place in it (img2dataset's scheme)."""
    return f"{number:08d}{place:04d}"


def split_by_hash(value: str, validation: float, test: float) -> str:
    """'test', 'validation' or 'train', by the value alone: a split never moves."""
    share = int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big") / 2**64
    return "test" if share < test else "validation" if share < test + validation else "train"


def _reference_hash(url: str) -> bytes:
    return hashlib.blake2b(url.encode(), digest_size=8).digest()


# --- kinds of lists ---------------------------------------------------------------------------------------------------


def read_rows(path: str, recipe: SourceRecipe) -> Iterator[Row]:
    """The rows of one list in its order, read as they are asked for. Raises UserError as ``scan`` does."""
    kind, where = _kind(path)
    if kind == "emoji":
        from pipeline.data.emoji import emoji_rows
        from pipeline.data.emoji_flaws import flawed_rows

        for row in flawed_rows() if where == "flawed" else emoji_rows(where):
            yield Row(row.url, _captions([row.caption]), row.group, row.split, "", row.license, row.attribution)
    elif kind == "folder":
        yield from _folder_rows(Path(where))
    elif kind == "tar":
        yield from _tar_rows(Path(where))
    else:
        yield from _table_rows(Path(where), recipe)


def _kind(path: str) -> tuple[str, str]:
    if path.startswith("emoji:"):
        return "emoji", path.removeprefix("emoji:")
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(f"source {path}: no such file or folder")
    if file.is_dir():
        return "folder", str(file.absolute())
    if file.suffix in (".parquet", ".csv", ".tsv", ".tar"):
        return file.suffix[1:], str(file.absolute())
    raise UserError(f"source {path}: not a .parquet, .csv, .tsv or .tar file, nor a folder")


def _fingerprint(path: str) -> Any:
    """Changes whenever the segment may have changed. Equal ones are not read again."""
    kind, where = _kind(path)
    if kind == "emoji":
        from pipeline.data.emoji import fingerprint

        return ["emoji", where, fingerprint()]
    try:
        if kind == "folder":
            return ["folder", where, [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in _files(Path(where))]]
        if kind == "tar":
            return ["tar", where, os.stat(where).st_size, os.stat(where).st_mtime_ns]
        with open(where, "rb") as f:
            return [kind, hashlib.file_digest(f, "sha256").hexdigest()]
    except PermissionError:
        raise UserError(f"source {path}: no permission to read it") from None


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith((*IMAGES, ".txt")):
                yield Path(root, name)


def _folder_rows(folder: Path) -> Iterator[Row]:
    for file in _files(folder):
        if file.suffix.lower() in IMAGES:
            text = file.with_suffix(".txt")
            lines = text.read_text(errors="replace").splitlines() if text.exists() else []
            yield Row(f"file://{quote(str(file))}", _captions(lines))


def tar_reference(tar: str, member: str, offset: int, size: int) -> str:
    """A member of an existing tar, to be used where it lies."""
    return f"tar://{quote(tar)}?offset={offset}&size={size}#{quote(member)}"


def _tar_rows(path: Path) -> Iterator[Row]:
    """Members that share a name up to the first dot of their base name are one sample, as in webdataset."""
    try:
        with tarfile.open(path) as tar:
            lines: list[str] = []
            name, image = "", None
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if (sample := f"{folder}/{stem}") != name:
                    if image is not None:
                        yield Row(image, _captions(lines))
                    name, image, lines = sample, None, []
                if f".{extension.lower()}" in IMAGES:
                    image = tar_reference(str(path), member.name, member.offset_data, member.size)
                elif extension in ("txt", "caption"):
                    content = tar.extractfile(member)
                    lines = content.read(1 << 20).decode(errors="replace").splitlines() if content else []
            if image is not None:
                yield Row(image, _captions(lines))
    except tarfile.TarError as e:
        raise UserError(f"source {path}: not a readable tar ({e})") from None


def _table_rows(path: Path, recipe: SourceRecipe) -> Iterator[Row]:
    import pyarrow as pa

    try:
        for batch in _batches(path):
            names = batch.schema.names
            for column in (recipe.image_column, recipe.caption_column):
                if column not in names:
                    raise UserError(
                        f"source {path}: no column {column}; it has {', '.join(names)}. "
                        "Set source.image_column or source.caption_column"
                    )
            optional = {
                n: c
                for n in ("group", "split", "sha256")
                if (c := getattr(recipe, f"{'hash' if n == 'sha256' else n}_column")) in names
            }
            extra = {n: n for n in ("license", "attribution") if n in names}
            for row in batch.to_pylist():
                caption = row[recipe.caption_column]
                texts = caption if isinstance(caption, list) else [caption]
                fields = {n: str(row[c] or "") for n, c in (optional | extra).items()}
                if fields.get("split") not in (None, "", "train", "validation", "test"):
                    raise UserError(f"source {path}: split {fields['split']!r} is not train, validation or test")
                yield Row(str(row[recipe.image_column] or "").strip(), _captions(texts), **fields)
    except (pa.ArrowInvalid, UnicodeDecodeError) as e:
        raise UserError(f"source {path}: cannot be read ({str(e).splitlines()[0]})") from None


def _batches(path: Path) -> Iterable[Any]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.ParquetFile(path).iter_batches(batch_size=10_000)
    from pyarrow import csv

    delimiter = "\t" if path.suffix == ".tsv" else ","
    with open(path, newline="", errors="replace") as f:
        header = f.readline().rstrip("\r\n").split(delimiter)
    strings = {name.strip('"'): "string" for name in header}
    return csv.open_csv(
        path,
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=strings, strings_can_be_null=True),
    )


def _captions(lines: Iterable[Any]) -> tuple[str, ...]:
    return tuple(text for line in lines if line is not None and (text := " ".join(str(line).split())))


# --- stages -----------------------------------------------------------------------------------------------------------


def run_source(ctx: Context) -> Artifact:
    """Store the references of every shard."""
    return _publish(ctx, "refs", "image_key")


def run_captions(ctx: Context) -> Artifact:
    """Store the captions of every shard."""
    return _publish(ctx, "captions", "caption_key")


def _publish(ctx: Context, blob: str, key: str) -> Artifact:
    found = scan(ctx.recipe, ctx.store, write=True)
    shards = [Shard(s.number, getattr(s, key), s.ledger, {blob: getattr(s, blob)}) for s in found.shards]
    table, ledger = write_shard_table(ctx.store, shards)
    return publish_artifact(ctx.store, ctx.publishable(shard_table=table, ledger=ledger), seconds=0.0)
