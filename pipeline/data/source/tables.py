"""Reads tables of rows: text, Parquet and spreadsheets, in a child process (see text.py, parquet.py and sheets.py)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.data.fetch.references import without_password
from pipeline.data.source.columns import IMAGES, SIZES, SUFFIXES, Flaw, one_line_each, table_kind
from pipeline.data.source.duplicates import merged
from pipeline.data.source.reader import ListReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListRow, SplitFiles, file_fingerprint, flawed
from pipeline.errors import UserError
from pipeline.local import PathPolicy, local_path, reason_of

# What a table says where it has no value, as pyarrow and pandas read it. In a column of groups it is a group.
NO_VALUE = frozenset(("#N/A", "#NA", "-NaN", "-nan", "N/A", "NA", "NULL", "NaN", "n/a", "nan", "null"))
SHEETS = (".xlsx", ".xls", ".xlsb", ".ods")
NAMED = (*SHEETS, ".txt")  # tables where a path names them; in folders a .txt has the captions of an image
LARGE = 256 << 20  # bytes of a file, such as one with images, that is known by its size and time, not by a hash
PLACED = re.compile(r"/|[A-Za-z][A-Za-z0-9+.-]*:")  # an absolute path, or a URL


class TableFiles(SplitFiles):
    """A table, or a folder of tables."""

    kind, suffixes = "tables", SUFFIXES

    def file_rows(self, file: Path, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        return listed_rows(file, recipe, reader, self.policy(recipe))

    @classmethod
    def matches(cls, path: str) -> bool:
        return super().matches(path) or (path.lower().endswith(NAMED) and os.path.isfile(os.path.expanduser(path)))

    def fingerprint(self) -> Any:
        if self.file.is_file() and self.file.stat().st_size > LARGE:
            return ["large table", *file_fingerprint(self.file)]
        return super().fingerprint()

    def stated_sides(self, recipe: SourceRecipe) -> Iterator[int]:
        columns = (recipe.image_column, recipe.caption_column)
        for file in self.files():
            with suppress(UserError):  # such columns of another type: only this asks for them
                for row in table_rows(file, columns, SIZES, encoding=recipe.encoding):
                    if not isinstance(row, Flaw) and (side := _short_side(row[2:])) > 0:
                        yield side


def table_rows(
    path: Path, needed: Sequence[str], optional: Sequence[str], reader: ListReader | None = None, encoding: str = ""
) -> Iterator[list[Any] | Flaw]:
    """Yields for each row its values in ``needed`` and ``optional`` columns.

    A value is text, a list of texts and Nones, or None where it is empty or its column is absent. A caption, the second
    value, is cut behind columns.MAX_CAPTION characters.

    Args:
        path: Path of a CSV, TSV, JSONL or Parquet file, or of a spreadsheet.
        needed: The columns of the references of images and of the captions. Where one has the name that it has by
            default and is absent, the one column of a name in KNOWN is taken.
        optional: Other columns.
        reader: The reader of the list that has the file; without it the file is a list.
        encoding: Encoding of text that is not UTF-8.

    Raises:
        UserError: for a file that cannot be read, is in an unknown encoding, lacks a column, or has one twice or of
            another type.
    """
    if reader is None:
        with ListReader() as own:
            yield from table_rows(path, needed, optional, own, encoding)
        return
    wanted = [*needed, *optional]
    kind = (
        "sheet" if path.name.lower().endswith(SHEETS) else "parquet" if table_kind(path.name) == ".parquet" else "text"
    )
    yield from reader.rows(kind, path, len(wanted), wanted, len(needed), *([encoding] if kind == "text" else []))


def listed_rows(
    file: Path,
    recipe: SourceRecipe,
    reader: ListReader,
    may: PathPolicy | None = None,
    beside: Callable[[str], str] | None = None,
) -> Iterator[ListRow]:
    """Yields the rows of a table as those of a list; ``may`` and ``beside`` are those of ``listed_row``.

    Without ``may`` none are merged.
    """
    wanted = wanted_columns(recipe)
    found = table_rows(file, wanted[:2], wanted[2:], reader, recipe.encoding)
    if recipe.image_folder or beside is None:
        beside = partial(file_beside, recipe.images_in(file.parent))
    rows = (listed_row(str(file), number, values, may, beside) for number, values in enumerate(found, 1))
    return merged(rows) if may else rows


def wanted_columns(recipe: SourceRecipe) -> list[str]:
    """Returns the columns of image, captions, split, sha256, license, attribution and group."""
    needed = [recipe.image_column, recipe.caption_column]
    return [*needed, recipe.split_column, recipe.hash_column, "license", "attribution", recipe.group_column]


def listed_row(
    path: str, number: int, values: Sequence[Any] | Flaw, may: PathPolicy | None, beside: Callable[[str], str]
) -> ListRow:
    """Returns the row of a list that a row of a table is.

    Args:
        path: Path of the list.
        number: Number of the row in it.
        values: Image, captions, split, sha256, license, attribution and group; None where there is none.
        may: Policy of the list; without it references stay as they are.
        beside: Makes a reference of the relative path of an image.

    Raises:
        UserError: for a split of another name.
    """
    if isinstance(values, Flaw):
        return flawed(values)
    url, captions, *fields, group = values
    texts = captions if isinstance(captions, list) else [captions]
    url, split, sha256, license, attribution = ("" if v is None or v in NO_VALUE else v for v in (url, *fields))
    if split not in ("", "train", "validation", "test"):
        raise UserError(
            f"source {path}: row {number:,}: split {split!r} is not train, validation or test; write one of these, "
            "or name another column in source.split_column"
        )
    reference = without_password(url.strip())
    captions = one_line_each(text for text in texts if text not in NO_VALUE)
    refusal = None
    if may is not None:
        if reference.lower().endswith(IMAGES) and not PLACED.match(reference):
            reference = beside(reference)
        refusal = may.refusal(reference)
        if refusal is None and reference.startswith(("/", "file:")):
            refusal = link_refusal(reference, may)
    # Images may be grouped by the column of their references, or by that of the pages that they stand in.
    grouped = without_password(group) if group else ""
    return ListRow(reference, captions, grouped, split, sha256, license, attribution, refusal)


def file_beside(folder: Path, path: str) -> str:
    """Returns the reference of a file by its path relative to a folder."""
    return f"file://{quote(os.fsencode(folder / path))}"


def named_file(reference: str) -> str:
    """Returns the file that a row names; "" where it names none, or nothing that can be read as a reference."""
    try:
        return local_path(reference) or ""
    except ValueError:
        return ""


def link_refusal(reference: str, may: PathPolicy) -> str | None:
    """Returns why a link to a file is refused. The fetch would refuse it, too, but keys count what is read here."""
    try:
        if os.path.islink(file := named_file(reference)):
            may.resolve(file)
    except OSError as e:
        return reason_of(e)
    return None


def _short_side(sizes: list[Any]) -> int:
    """Returns the shorter side of the first of some widths and heights, 0 if there are none."""
    for width, height in zip(sizes[::2], sizes[1::2], strict=True):
        with suppress(TypeError, ValueError, OverflowError):
            return int(min(float(width), float(height)))
    return 0
