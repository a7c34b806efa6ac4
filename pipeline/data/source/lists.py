"""Reads lists: tables, folders of images and texts, tars that are used where they lie, and the emoji set."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.fetch.references import without_password
from pipeline.data.source.imported import embedding_reference, is_embeddings, metadata_parts
from pipeline.data.source.tables import IMAGES, LIMIT, Flaw, table_rows
from pipeline.errors import UserError
from pipeline.local import Reach, open_local

if TYPE_CHECKING:
    from pipeline.data.source.stage import SourceRecipe

ROWS_SUFFIX = ".rows"  # ends the name of a file of rows as they were read (see write_rows)
# What a table says where it has no value, as pyarrow and pandas read it. In a column of groups it is a group.
NO_VALUE = frozenset(("#N/A", "#NA", "-NaN", "-nan", "N/A", "NA", "NULL", "NaN", "n/a", "nan", "null"))
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class ListRow:
    """Holds one row of a list.

    Attributes:
        url: An http(s), s3 or file reference, a member of a tar (see tar_reference), or an embedding (see
            pipeline.data.source.imported).
        reject: The reason if the list may not name it, or if the row cannot be read.
        flaw: What is wrong with a row that cannot be read, and where.
    """

    url: str
    captions: tuple[str, ...]
    group: str = ""
    split: str = ""
    sha256: str = ""
    license: str = ""
    attribution: str = ""
    reject: str | None = None
    flaw: str = ""


def read_rows(path: str, recipe: SourceRecipe) -> Iterator[ListRow]:
    """Yields the rows of one list in its order, read as they are asked for.

    Raises:
        UserError: as ``scan`` does, and behind the last row if none of them can be read, or none has a caption.
    """
    kind, where = _kind(path)
    rows = unread = spoken = 0
    flaw = ""
    try:
        for row in _rows(path, kind, where, recipe):
            rows += 1
            unread += bool(row.flaw)
            flaw = flaw or row.flaw
            spoken += bool(row.captions)
            yield row
    except OSError as e:
        raise UserError(f"source {path}: cannot be read ({e.strerror or e})") from None
    if rows and not spoken:
        if flaw:
            raise UserError(
                f"source {path}: no row with a caption can be read, and {unread:,} of {rows:,} not at all: {flaw}"
            )
        raise UserError(
            f"source {path}: no row has a caption, so nothing can be trained on it; {_looked_for(kind, where, recipe)}"
        )


def _looked_for(kind: str, where: str, recipe: SourceRecipe) -> str:
    """Returns where the captions of a list would have been found."""
    if kind == "folder":
        image = next(file for file in _files(Path(where)) if file.suffix.lower() in IMAGES)
        text = image.with_suffix(".txt")
        return f"put a line of text into {text} for {image.name}, and so on (metadata.jsonl is not read)"
    if kind == "tar":
        return "in a tar, 000.txt or 000.caption has the caption of 000.jpg (000.json is not read)"
    return f"its column {recipe.caption_column} is empty; name another one in source.caption_column"


def _rows(path: str, kind: str, where: str, recipe: SourceRecipe) -> Iterator[ListRow]:
    if kind == "emoji":
        from pipeline.data.source.emoji.flaws import flawed_rows
        from pipeline.data.source.emoji.listing import emoji_rows

        for url, captions, group, split, *rights in flawed_rows() if where == "flawed" else emoji_rows(where):
            yield ListRow(url, _captions(captions), group, split, "", *rights)
    elif kind == "folder":
        yield from _folder_rows(Path(where), reach(recipe, path))
    elif kind == "tar":
        yield from _tar_rows(Path(where))
    elif kind == "embeddings":
        yield from _embedding_rows(Path(where), recipe, reach(recipe, path))
    elif kind == "rows":
        may = reach(recipe, path)
        try:
            for row in written_rows(Path(where)):
                yield replace(row, reject=row.reject or may.refusal(row.url))
        except (pa.ArrowInvalid, TypeError, KeyError) as e:
            raise UserError(f"source {path}: not a file of rows as a package holds them ({e}); name the list") from None
    else:
        yield from _table_rows(Path(where), recipe, reach(recipe, path))


def reach(recipe: SourceRecipe, *paths: str) -> Reach:
    """Returns what these lists may name.

    A table may name what lies below its folder, any other list its own files, and all of them what ``recipe.roots``
    names. Raises UserError for a list that is missing.
    """
    kinds = [_kind(path) for path in paths]
    own = [
        where if kind in ("folder", "tar", "embeddings") else os.path.dirname(where)
        for kind, where in kinds
        if kind != "emoji"
    ]
    return Reach.of(own, recipe.roots)


def _beside(folder: Path, reference: str) -> str:
    """Returns an image's relative path as a reference to a file, counted from the folder of its list."""
    relative = not reference.startswith("/") and not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", reference)
    if relative and reference.lower().endswith(IMAGES):
        return f"file://{quote(os.fsencode(folder / reference))}"
    return reference


def _kind(path: str) -> tuple[str, str]:
    if path.startswith("emoji:"):
        return "emoji", path.removeprefix("emoji:")
    file = Path(path).expanduser()
    if not file.exists():
        where = "" if file.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"source {path}: no such file or folder{where}")
    if file.is_dir():
        return "embeddings" if is_embeddings(file) else "folder", str(file.absolute())
    if not file.is_file():
        raise UserError(f"source {path}: not a regular file, and nothing else is read")
    if (suffix := file.suffix.lower()) in (".parquet", ".csv", ".tsv", ".tar", ROWS_SUFFIX):
        return suffix[1:], str(file.absolute())
    if suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip"):
        raise UserError(f"source {path}: lists and tars are not read out of a compressed file; unpack it first")
    raise UserError(f"source {path}: not a .parquet, .csv, .tsv or .tar file, nor a folder")


def fingerprint(path: str) -> Any:
    """Returns a value that changes whenever the segment may have changed. An equal one is not read again."""
    kind, where = _kind(path)
    if kind == "emoji":
        from pipeline.data.source.emoji import listing as emoji

        return ["emoji", where, emoji.emoji_fingerprint()]
    try:
        if kind in ("folder", "embeddings"):
            files = _files(Path(where)) if kind == "folder" else sorted(Path(where).glob("*/*"))
            return [kind, where, [_file_fingerprint(p) for p in files]]
        if kind == "tar":
            return ["tar", where, os.stat(where).st_size, os.stat(where).st_mtime_ns]
        with open(where, "rb") as f:
            # With its folder, by which its references are judged.
            return [kind, os.path.dirname(where), hashlib.file_digest(f, "sha256").hexdigest()]
    except PermissionError:
        raise UserError(f"source {path}: no permission to read it") from None


def _file_fingerprint(file: Path) -> list[Any]:
    try:
        found = file.stat()
    except PermissionError:
        raise
    except OSError:  # a link that leads nowhere, or in a circle: the fetch counts it
        found = file.lstat()
    name = os.fsencode(file).decode("utf-8", "backslashreplace")
    return [name, found.st_size, found.st_mtime_ns]


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith((*IMAGES, ".txt")):
                yield Path(root, name)


def _folder_rows(folder: Path, may: Reach) -> Iterator[ListRow]:
    for file in _files(folder):
        if file.suffix.lower() in IMAGES:
            text = file.with_suffix(".txt")
            yield _spoken(f"file://{quote(os.fsencode(file))}", _bytes(text, may), str(text))


def _bytes(text: Path, may: Reach) -> bytes:
    """Returns the bytes of a text file, one more than LIMIT at most.

    It has none if it is missing or irregular, or a link to what the list may not name.
    """
    try:
        with open_local(text, may) as file:
            return file.read(LIMIT + 1)
    except OSError:
        return b""


def _spoken(url: str, data: bytes, where: str) -> ListRow:
    """Returns a row whose captions are the lines of a file."""
    if len(data) > LIMIT:
        return ListRow(url, (), reject="malformed_row", flaw=f"{where} has over {LIMIT:,} bytes")
    try:
        return ListRow(url, _captions(data.decode("utf-8-sig").splitlines()))
    except UnicodeDecodeError as e:
        flaw = f"byte {e.start + 1} of {where} is 0x{data[e.start]:02x}, which is not UTF-8"
        return ListRow(url, (), reject="not_utf8", flaw=flaw)


def write_rows(file: IO[bytes], rows: Iterable[ListRow]) -> int:
    """Writes rows as Parquet, so that they are read elsewhere as they were here. Returns their number."""
    text, texts = pa.string(), pa.list_(pa.string())
    schema = pa.schema([(field.name, texts if field.name == "captions" else text) for field in fields(ListRow)])
    rest, count = iter(rows), 0
    with pq.ParquetWriter(file, schema, compression="zstd", store_schema=False) as writer:
        while block := list(islice(rest, 10_000)):
            writer.write_table(pa.Table.from_pylist([vars(row) for row in block], schema))
            count += len(block)
    return count


def written_rows(file: Path | pa.NativeFile) -> Iterator[ListRow]:
    """Yields the rows that ``write_rows`` has written."""
    for batch in pq.ParquetFile(file).iter_batches(batch_size=10_000):
        for row in batch.to_pylist():
            yield ListRow(**{**row, "captions": tuple(row["captions"])})


def _embedding_rows(folder: Path, recipe: SourceRecipe, may: Reach) -> Iterator[ListRow]:
    """Yields a row for each embedding, split as its image would be; the list's hash is that image's."""
    for part, metadata in metadata_parts(folder, may):
        for i, row in enumerate(_table_rows(metadata, recipe)):
            url = "" if row.reject else embedding_reference(folder, part, i)
            yield replace(row, url=url, group=row.group or row.url, sha256="")


def tar_reference(tar: str, member: str, offset: int, size: int) -> str:
    """Returns the reference of a member of an existing tar, to be used where it lies."""
    return f"tar://{quote(tar)}?offset={offset}&size={size}#{quote(member, errors='surrogateescape')}"


def tar_place(reference: str) -> dict[str, Any] | None:
    """Returns path, offset and size of a member of a tar (see tar_reference), or None if it does not say them."""
    try:
        parts = urlsplit(reference)
        query = parse_qs(parts.query)
        offset, size = int(query["offset"][0]), int(query["size"][0])
    except (KeyError, ValueError):
        return None
    path = unquote(parts.path)
    return {"tar": path, "offset": offset, "size": size} if path and offset >= 0 and size >= 0 else None


def _tar_rows(path: Path) -> Iterator[ListRow]:
    """Yields the samples of a tar: members that share a name up to the first dot, as in webdataset."""
    with open_local(path) as file:
        head = file.read(6)
        if packed := next((kind for magic, kind in PACKED.items() if head.startswith(magic)), None):
            raise UserError(
                f"source {path}: compressed with {packed}; images are read where they lie, so unpack it first"
            )
        try:
            yield from _members(path, file)
        except (
            tarfile.TarError,
            ValueError,
            OverflowError,
            OSError,
        ) as e:  # tarfile believes sizes, even negative ones
            raise UserError(f"source {path}: not a readable tar ({e})") from None


class _Tar:
    """Reads a tar for tarfile, which otherwise takes as much memory as a header says that it is long."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= 2 * LIMIT:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._read(size)


def _members(path: Path, file: BinaryIO) -> Iterator[ListRow]:
    file.seek(0)
    with tarfile.open(fileobj=_Tar(file), mode="r:") as tar:  # type: ignore[call-overload]
        text, text_name = b"", ""
        name, image = "", None
        for member in tar:
            if tar.offset <= member.offset:  # by a negative size, the next one would be this one, without end
                raise tarfile.ReadError(f"the member {member.name!r} ends before it begins")
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if (sample := f"{folder}/{stem}") != name:
                if image is not None:
                    yield _spoken(image, text, text_name)
                name, image, text = sample, None, b""
            if f".{extension.lower()}" in IMAGES:
                image = tar_reference(str(path), member.name, member.offset_data, member.size)
            elif extension in ("txt", "caption"):
                content = tar.extractfile(member)
                text, text_name = content.read(LIMIT + 1) if content else b"", f"{member.name!r} in {path}"
        if image is not None:
            yield _spoken(image, text, text_name)
        # Where a header is damaged, or another tar begins, tarfile ends as if there were no more members.
        file.seek(tar.offset)
        if file.read(LIMIT).strip(b"\0"):
            raise UserError(
                f"source {path}: damaged at byte {tar.offset:,}, or another tar follows there; write it again, "
                "or join tars with: tar --concatenate"
            )


def _table_rows(path: Path, recipe: SourceRecipe, may: Reach | None = None) -> Iterator[ListRow]:
    """Yields the rows of a table.

    With ``may``, what the table may name, relative paths of images count from its folder.
    """
    optional = (recipe.split_column, recipe.hash_column, "license", "attribution", recipe.group_column)
    found = table_rows(path, (recipe.image_column, recipe.caption_column), optional)
    for number, values in enumerate(found, 1):
        if isinstance(values, Flaw):
            yield ListRow("", (), reject=values.reason, flaw=values.what)
            continue
        url, captions, *fields, group = values
        texts = captions if isinstance(captions, list) else [captions]
        url, split, sha256, license, attribution = ("" if v is None or v in NO_VALUE else v for v in (url, *fields))
        if split not in ("", "train", "validation", "test"):
            raise UserError(f"source {path}: row {number:,}: split {split!r} is not train, validation or test")
        reference = without_password(url.strip())
        spoken = _captions(text for text in texts if text not in NO_VALUE)
        if may is not None:
            reference = _beside(path.parent, reference)
        refusal = may.refusal(reference) if may else None
        # Images may be grouped by the column of their references, or by that of the pages that they stand in.
        grouped = without_password(group or "")
        yield ListRow(reference, spoken, grouped, split, sha256, license, attribution, refusal)


def _captions(lines: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(text for line in lines if line and (text := " ".join(line.split())))
