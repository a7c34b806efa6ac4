"""Kinds of lists: tables, folders of pictures and texts, tars that are used where they lie, and the emoji set."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote

from pipeline.data.imported import embedding_reference, is_embeddings, metadata_parts
from pipeline.data.references import without_password
from pipeline.errors import UserError
from pipeline.local import Reach, open_local

if TYPE_CHECKING:
    from pipeline.data.source import SourceRecipe

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
ROWS = ".rows"  # ends the name of a file of rows as they were read (see write_rows)
CAPTION_BYTES = 1 << 20  # of a text file that are read


@dataclass(frozen=True)
class Row:
    """One row of a list. ``url`` is an http(s), s3 or file reference, a member of a tar (see tar_reference), or
    an embedding (see pipeline.data.imported). ``reject``: the reason why the list may not name it, or None."""

    url: str
    captions: tuple[str, ...]
    group: str = ""
    split: str = ""
    sha256: str = ""
    license: str = ""
    attribution: str = ""
    reject: str | None = None


def read_rows(path: str, recipe: SourceRecipe) -> Iterator[Row]:
    """The rows of one list in its order, read as they are asked for. Raises UserError as ``scan`` does."""
    kind, where = _kind(path)
    if kind == "emoji":
        from pipeline.data.emoji import emoji_rows
        from pipeline.data.emoji_flaws import flawed_rows

        for row in flawed_rows() if where == "flawed" else emoji_rows(where):
            yield Row(row.url, _captions([row.caption]), row.group, row.split, "", row.license, row.attribution)
    elif kind == "folder":
        yield from _folder_rows(Path(where), reach(recipe, path))
    elif kind == "tar":
        yield from _tar_rows(Path(where))
    elif kind == "embeddings":
        yield from _embedding_rows(Path(where), recipe, reach(recipe, path))
    elif kind == "rows":
        may = reach(recipe, path)
        for written in _written_rows(Path(where)):
            yield replace(written, reject=written.reject or may.refusal(written.url))
    else:
        may = reach(recipe, path)
        for listed in _table_rows(Path(where), recipe):
            url = _beside(Path(where).parent, listed.url)
            yield replace(listed, url=url, reject=may.refusal(url))


def reach(recipe: SourceRecipe, *paths: str) -> Reach:
    """Returns what these lists may name: a table what lies below its folder, any other list its own files, and all of
    them what ``recipe.roots`` names. Raises UserError for a list that is missing."""
    kinds = [_kind(path) for path in paths]
    own = [
        where if kind in ("folder", "tar", "embeddings") else os.path.dirname(where)
        for kind, where in kinds
        if kind != "emoji"
    ]
    return Reach.of(own, recipe.roots)


def _beside(folder: Path, reference: str) -> str:
    """A picture's relative path as a reference to a file, counted from the folder of its list; all else as it is."""
    relative = not reference.startswith("/") and not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", reference)
    if relative and reference.lower().endswith(IMAGES):
        return f"file://{quote(os.fsencode(folder / reference))}"
    return reference


def _kind(path: str) -> tuple[str, str]:
    if path.startswith("emoji:"):
        return "emoji", path.removeprefix("emoji:")
    file = Path(path).expanduser()
    if not file.exists():
        where = "" if file.is_absolute() else f" in {Path.cwd()}, from where relative paths count"
        raise UserError(f"source {path}: no such file or folder{where}")
    if file.is_dir():
        return "embeddings" if is_embeddings(file) else "folder", str(file.absolute())
    if not file.is_file():
        raise UserError(f"source {path}: not a regular file, and nothing else is read")
    if file.suffix in (".parquet", ".csv", ".tsv", ".tar", ROWS):
        return file.suffix[1:], str(file.absolute())
    raise UserError(f"source {path}: not a .parquet, .csv, .tsv or .tar file, nor a folder")


def fingerprint(path: str) -> Any:
    """Changes whenever the segment may have changed. Equal ones are not read again."""
    kind, where = _kind(path)
    if kind == "emoji":
        from pipeline.data import emoji

        return ["emoji", where, emoji.fingerprint()]
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


def _folder_rows(folder: Path, may: Reach) -> Iterator[Row]:
    for file in _files(folder):
        if file.suffix.lower() in IMAGES:
            text = file.with_suffix(".txt")
            yield Row(f"file://{quote(os.fsencode(file))}", _captions(_lines(text, may)))


def write_rows(file: BinaryIO, rows: Iterable[Row]) -> None:
    """Writes rows as Parquet, so that a list is read elsewhere as it was here, whatever its columns are called."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, texts = pa.string(), pa.list_(pa.string())
    schema = pa.schema([(field.name, texts if field.name == "captions" else text) for field in fields(Row)])
    rest = iter(rows)
    with pq.ParquetWriter(file, schema, compression="zstd", store_schema=False) as writer:
        while block := list(islice(rest, 10_000)):
            writer.write_table(pa.Table.from_pylist([vars(row) for row in block], schema))


def _written_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=10_000):
            for row in batch.to_pylist():
                yield Row(**{**row, "captions": tuple(row["captions"])})
    except (pa.ArrowInvalid, TypeError, KeyError) as e:
        raise UserError(f"source {path}: not a file of rows as a package holds them ({e}); name the list") from None


def _lines(text: Path, may: Reach) -> list[str]:
    """The lines of a text file; none of one that is missing, irregular, or a link to what the list may not name."""
    try:
        with open_local(text, may) as file:
            return file.read(CAPTION_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return []


def _embedding_rows(folder: Path, recipe: SourceRecipe, may: Reach) -> Iterator[Row]:
    """Each is split as its picture would be; the list's hash is that picture's."""
    for part, metadata in metadata_parts(folder, may):
        for i, row in enumerate(_table_rows(metadata, recipe)):
            yield replace(row, url=embedding_reference(folder, part, i), group=row.group or row.url, sha256="")


def tar_reference(tar: str, member: str, offset: int, size: int) -> str:
    """A member of an existing tar, to be used where it lies."""
    return f"tar://{quote(tar)}?offset={offset}&size={size}#{quote(member, errors='surrogateescape')}"


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
                    lines = content.read(CAPTION_BYTES).decode(errors="replace").splitlines() if content else []
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
                yield Row(without_password(str(row[recipe.image_column] or "").strip()), _captions(texts), **fields)
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
    # As bytes: read as text, one value that is not UTF-8 would end the whole list.
    kinds = {name.strip('"'): "binary" for name in header}
    batches = csv.open_csv(
        path,
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=kinds, strings_can_be_null=True),
    )
    return map(_as_text, batches)


def _as_text(batch: Any) -> Any:
    """A batch whose columns of bytes are text; what is not UTF-8 becomes U+FFFD."""
    import pyarrow as pa

    columns = []
    for column in batch.columns:
        if pa.types.is_binary(column.type):
            try:
                column = column.cast(pa.string())
            except pa.ArrowInvalid:
                texts = [None if value is None else value.decode(errors="replace") for value in column.to_pylist()]
                column = pa.array(texts, pa.string())
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _captions(lines: Iterable[Any]) -> tuple[str, ...]:
    return tuple(text for line in lines if line is not None and (text := " ".join(str(line).split())))
