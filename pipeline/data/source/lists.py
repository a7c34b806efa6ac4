"""Reads lists: tables, folders of images, of tars and of tables, tars that are used where they lie, drawings."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.data.fetch.references import without_password
from pipeline.data.source.child import ListReader
from pipeline.data.source.columns import IMAGES, MAX_CAPTION, MAX_CAPTIONS, SIZES, Flaw
from pipeline.data.source.folders import METADATA, folder_kind, folder_splits, is_image, read_files, unread_files, walk
from pipeline.data.source.imported import embedding_reference, is_embeddings, metadata_parts
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.remote import check_remote, fetched, is_remote, remote_beside, remote_version
from pipeline.data.source.rows import ROWS_SUFFIX, SIDECARS, ListRow, one_line_each, packaged_rows
from pipeline.data.source.tables import SUFFIXES, table_kind, table_rows
from pipeline.data.source.tars import tar_rows
from pipeline.errors import UserError
from pipeline.local import PathPolicy, local_path, reason_of
from pipeline.progress import counted, say_once

# What a table says where it has no value, as pyarrow and pandas read it. In a column of groups it is a group.
NO_VALUE = frozenset(("#N/A", "#NA", "-NaN", "-nan", "N/A", "NA", "NULL", "NaN", "n/a", "nan", "null"))
FOLDERS = ("folder", "tars", "tables")  # kinds of lists


def read_rows(path: str, recipe: SourceRecipe) -> Iterator[ListRow]:
    """Yields the rows of one list in its order, read as they are asked for.

    Raises:
        UserError: as ``scan`` does, and behind the last row if none of them can be read, or none has a caption.
    """
    kind, where = _kind(path)
    rows = flawed = captioned = 0
    flaw = ""
    with ListReader() as reader:
        try:
            for row in _rows(path, kind, where, recipe, reader):
                rows += 1
                flawed += bool(row.flaw)
                flaw = flaw or row.flaw
                captioned += bool(row.captions)
                yield row
        except OSError as e:
            raise UserError(f"source {path}: cannot be read ({e.strerror or e})") from None
        say_once(reader.spent)
        if reader.cut:
            most = f"{MAX_CAPTION:,} characters, or those of a row to {MAX_CAPTIONS:,}"
            say_once(f"source {path}: {counted(reader.cut, 'caption')} cut to {most}; CLIP reads 77 tokens of each")
    if rows and not captioned:
        if flaw:
            raise UserError(
                f"source {path}: no row with a caption can be read, and {flawed:,} of {rows:,} not at all: {flaw}"
            )
        left = unread(path, recipe)
        raise UserError(
            f"source {path}: no row has a caption, so nothing can be trained on it; {_looked_for(kind, where, recipe)}"
            + (f"; and {left}" if left else "")
        )


def _looked_for(kind: str, where: str, recipe: SourceRecipe) -> str:
    """Returns where the captions of a list would have been found."""
    if kind == "folder":
        image, metadata = next(found for found in walk(Path(where)) if is_image(found[0]))
        if metadata is None:
            return (
                f"put a line of text into {image.with_suffix('.txt')} for {image.name}, and so on, or write "
                '{"file_name": "'
                f'{image.name}", "text": "..."}} and so on into {image.with_name(METADATA[0])}'
            )
    if kind in ("tar", "tars"):
        return "in a tar, 000.txt, 000.caption or the caption in 000.json belongs to 000.jpg"
    return f"its column {recipe.caption_column} is empty; name another one in source.caption_column"


def _rows(path: str, kind: str, where: str, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
    if kind == "drawings":
        from pipeline.data.source.drawings.flaws import flawed_rows
        from pipeline.data.source.drawings.listing import drawing_rows

        for url, captions, group, split, *rights in flawed_rows() if where == "flawed" else drawing_rows(where):
            yield ListRow(url, one_line_each(captions), group, split, "", *rights)
    elif kind == "folder":
        yield from _folder_rows(Path(where), recipe, path_policy(recipe, path), reader)
    elif kind == "tables":
        for file in read_files(Path(where), kind):
            yield from _merged(_table_rows(file, recipe, reader, path_policy(recipe, path)))
    elif kind in ("tar", "tars"):
        for file in read_files(Path(where), kind) if kind == "tars" else [Path(where)]:
            yield from tar_rows(file, reader)
    elif kind == "embeddings":
        yield from _embedding_rows(Path(where), recipe, path_policy(recipe, path), reader)
    elif kind == "rows":
        may = path_policy(recipe, path)
        for row in packaged_rows(Path(where), reader):
            yield replace(row, reject=row.reject or may.refusal(row.url))
    elif kind == "remote":
        copy = fetched(path)
        try:
            yield from _merged(_table_rows(copy, recipe, reader, path_policy(recipe, path), path))
        except UserError as e:
            raise UserError(str(e).replace(str(copy), path)) from None
    else:
        yield from _merged(_table_rows(Path(where), recipe, reader, path_policy(recipe, path)))


def path_policy(recipe: SourceRecipe, *paths: str) -> PathPolicy:
    """Returns what these lists may name.

    A table may name what lies below its folder, on this machine or on S3, any other list its own files, and all of them
    what ``recipe.roots`` names. Raises UserError for a list that is missing.
    """
    kinds = [_kind(path) for path in paths]
    own = [
        where if kind in (*FOLDERS, "tar", "embeddings") else os.path.dirname(where)
        for kind, where in kinds
        if kind not in ("drawings", "remote")
    ]
    beside = [os.path.dirname(where) for kind, where in kinds if kind == "remote" and where.startswith("s3://")]
    return PathPolicy.of(own, [*recipe.roots, *beside])


def _beside(place: Path | str, reference: str) -> str:
    """Returns an image's relative path as a reference, counted from the folder of its list, or from a list's URL."""
    relative = not reference.startswith("/") and not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", reference)
    if relative and reference.lower().endswith(IMAGES):
        if isinstance(place, str):
            return remote_beside(place, reference)
        return f"file://{quote(os.fsencode(place / reference))}"
    return reference


def _kind(path: str) -> tuple[str, str]:
    if path.startswith("drawings:"):
        return "drawings", path.removeprefix("drawings:")
    if is_remote(path):
        check_remote(path)
        return "remote", path
    file = Path(os.path.expanduser(path))
    if not file.exists():
        where = "" if file.is_absolute() else f" in {Path.cwd()}"
        pattern = "; patterns are not expanded: name the folder" if set("*{") & set(path) else ""
        raise UserError(f"source {path}: no such file or folder{where}{pattern}")
    if file.is_dir():
        return "embeddings" if is_embeddings(file) else folder_kind(file), str(file.absolute())
    if not file.is_file():
        raise UserError(f"source {path}: not a regular file, and nothing else is read")
    if kind := table_kind(file.name) or next((s for s in (".tar", ROWS_SUFFIX) if file.name.lower().endswith(s)), ""):
        return kind[1:], str(file.absolute())
    if file.suffix.lower() in (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip"):
        raise UserError(
            f"source {path}: of compressed files only .csv.gz, .tsv.gz and .jsonl.gz are read; unpack it first"
        )
    raise UserError(
        f"source {path}: not a {', '.join(SUFFIXES[:4])} or .tar file, nor a folder; save it as one of them"
    )


def fingerprint(path: str) -> Any:
    """Returns a value that changes whenever the segment may have changed. An equal one is not read again."""
    kind, where = _kind(path)
    if kind == "drawings":
        from pipeline.data.source.drawings.listing import drawings_fingerprint

        return ["drawings", where, drawings_fingerprint()]
    if kind == "remote":
        return [kind, path, remote_version(path)]
    try:
        if kind in (*FOLDERS, "embeddings"):
            files = sorted(Path(where).glob("*/*")) if kind == "embeddings" else read_files(Path(where), kind)
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


def unread(path: str, recipe: SourceRecipe) -> str:
    """Returns how many files of a list that is a folder are not read, by kind; "" if there are none."""
    kind, where = _kind(path)
    if kind not in FOLDERS:
        return ""
    folder, may = Path(where), path_policy(recipe, path)
    tables = [file for file, metadata in walk(folder) if kind == "folder" and file == metadata]
    with ListReader() as reader:
        named = frozenset(
            _named_file(row.url) for table in tables for row in _metadata_rows(table, recipe, may, reader)
        )
    return unread_files(folder, kind, named)


def no_rows(path: str, recipe: SourceRecipe) -> UserError:
    """Returns the error for a list without a row, which says what a folder has instead."""
    left = unread(path, recipe)
    kinds = "; it has no image, tar or table" if Path(os.path.expanduser(path)).is_dir() else ""
    return UserError(f"source {path}: no rows{kinds}{left and f': {left}'}")


def stated_sides(path: str, recipe: SourceRecipe) -> Iterator[int]:
    """Yields the short sides of images, in pixels, of the rows in which a table states width and height."""
    kind, where = _kind(path)
    if kind == "tables":
        files = list(read_files(Path(where), kind))
    elif kind == "remote":
        files = [fetched(path)]
    else:
        files = [Path(where)] if f".{kind}" in SUFFIXES else []
    for file in files:
        with suppress(UserError):  # such columns of another type: only this asks for them
            for row in table_rows(file, (recipe.image_column, recipe.caption_column), SIZES):
                if not isinstance(row, Flaw) and (side := _short_side(row[2:])) > 0:
                    yield side


def _short_side(sizes: list[Any]) -> int:
    """Returns the shorter side of the first of some widths and heights, 0 if there are none."""
    for width, height in zip(sizes[::2], sizes[1::2], strict=True):
        with suppress(TypeError, ValueError, OverflowError):
            return int(min(float(width), float(height)))
    return 0


def _folder_rows(folder: Path, recipe: SourceRecipe, may: PathPolicy, reader: ListReader) -> Iterator[ListRow]:
    """Yields the rows of metadata, as in an imagefolder, and those of images that no metadata speak for."""
    splits = folder_splits(folder)
    for file, metadata in walk(folder):
        if reader.spent:
            return
        if file == metadata:
            for row in _metadata_rows(file, recipe, may, reader):
                place = os.path.relpath(_named_file(row.url) or folder, folder).split(os.sep)[0]
                yield replace(row, split=row.split or splits.get(place, ""))
        elif metadata is None and is_image(file):
            row = _sidecar_row(file, may, reader)
            yield replace(row, reject=row.reject or _link_refusal(str(file), may))


def _metadata_rows(table: Path, recipe: SourceRecipe, may: PathPolicy, reader: ListReader) -> Iterator[ListRow]:
    column = "file_name" if recipe.image_column == "url" else recipe.image_column
    return _merged(_table_rows(table, replace(recipe, image_column=column), reader, may))


def _named_file(reference: str) -> str:
    """Returns the file that a row names; "" where it names none, or nothing that can be read as a reference."""
    try:
        return local_path(reference) or ""
    except ValueError:
        return ""


def _link_refusal(file: str, may: PathPolicy) -> str | None:
    """Returns why a link to a file is refused. The fetch would refuse it, too, but keys count what is read here."""
    try:
        if os.path.islink(file):
            may.resolve(file)
    except OSError as e:
        return reason_of(e)
    return None


def _sidecar_row(image: Path, may: PathPolicy, reader: ListReader) -> ListRow:
    """Returns the row of an image with the captions of the first of SIDECARS beside it that is not empty.

    One that is irregular, or a link to what the list may not name, counts as missing.
    """
    url = f"file://{quote(os.fsencode(image))}"
    for extension in SIDECARS:
        for case in (str.lower, str.upper):
            found: list[list[Any] | Flaw] = []
            with suppress(OSError):
                found = list(reader.rows("sidecar", image.with_suffix(f".{case(extension)}"), 2, extension, within=may))
            for values in found[:1]:
                if isinstance(values, Flaw):
                    return ListRow(url, (), reject=values.reason, flaw=values.what)
                return ListRow(url, tuple(filter(None, values[1] or ())))
    return ListRow(url, ())


def _embedding_rows(folder: Path, recipe: SourceRecipe, may: PathPolicy, reader: ListReader) -> Iterator[ListRow]:
    """Yields a row for each embedding, split as its image would be; the list's hash is that image's."""
    for part, metadata in metadata_parts(folder, may, reader):
        for i, row in enumerate(_table_rows(metadata, recipe, reader)):
            url = "" if row.reject else embedding_reference(folder, part, i, row.url)
            yield replace(row, url=url, group=row.group or row.url, sha256="")


def _merged(rows: Iterator[ListRow]) -> Iterator[ListRow]:
    """Yields rows with the captions of those that follow and name the same image, as in lists with a row a caption.

    Rows that differ in more than their captions stay rows of their own, and those that stand elsewhere; both are
    duplicates.
    """
    first: ListRow | None = None
    captions: dict[str, None] = {}
    room = merged = 0
    for row in rows:
        if first and row.url and row.url == first.url and not row.reject and _beyond(row) == _beyond(first):
            merged += 1
            for caption in row.captions:
                if len(caption) <= room and caption not in captions:
                    captions[caption] = None
                    room -= len(caption)
            continue
        if first:
            yield replace(first, captions=tuple(captions)) if merged else first
        first, captions, merged = row, dict.fromkeys(row.captions), 0
        room = MAX_CAPTIONS - sum(map(len, row.captions))
    if first:
        yield replace(first, captions=tuple(captions)) if merged else first


def _beyond(row: ListRow) -> tuple[str, ...]:
    """Returns what a row says besides its image and its captions."""
    return row.group, row.split, row.sha256, row.license, row.attribution


def _table_rows(
    path: Path, recipe: SourceRecipe, reader: ListReader, may: PathPolicy | None = None, remote: str | None = None
) -> Iterator[ListRow]:
    """Yields the rows of a table.

    With ``may``, what the table may name, relative paths of images count from its folder, or from that of ``remote``
    if it is a copy of that list.
    """
    optional = (recipe.split_column, recipe.hash_column, "license", "attribution", recipe.group_column)
    found = table_rows(path, (recipe.image_column, recipe.caption_column), optional, reader)
    place = remote or path.parent
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
        captions = one_line_each(text for text in texts if text not in NO_VALUE)
        if may is not None:
            reference = _beside(place, reference)
        refusal = may.refusal(reference) if may else None
        if may and refusal is None and reference.startswith(("/", "file:")):
            refusal = _link_refusal(_named_file(reference), may)
        # Images may be grouped by the column of their references, or by that of the pages that they stand in.
        grouped = without_password(group) if group else ""
        yield ListRow(reference, captions, grouped, split, sha256, license, attribution, refusal)
