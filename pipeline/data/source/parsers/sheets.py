"""Reads spreadsheets of Excel and LibreOffice, by the package of the extra ``xlsx``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.data.source.columns import Flaw, columns_of, text_of
from pipeline.data.source.parsers.child import Budget
from pipeline.data.source.parsers.text import check_header
from pipeline.errors import UserError
from pipeline.progress import say_once

try:
    import python_calamine as calamine
except ImportError:
    calamine = None  # type: ignore[assignment]


def sheet_rows(
    opened: BinaryIO, path: Path, budget: Budget, wanted: Sequence[str], needed: int
) -> Iterator[list[Any] | Flaw]:
    """Yields the rows of the first sheet with values as ``table_rows`` does; its first row names the columns."""
    if calamine is None:
        raise UserError(
            f"source {path}: spreadsheets need the extra xlsx: pip install 'python-calamine>=0.7,<1'; or save it as CSV"
        )
    try:
        with calamine.CalamineWorkbook.from_filelike(opened) as book:
            name, rows = _first_sheet(path, book)
            yield from _rows(path, name, rows, wanted, needed)
    except calamine.CalamineError as e:
        raise UserError(f"source {path}: not a spreadsheet that can be read ({str(e).splitlines()[0]})") from None


def _first_sheet(path: Path, book: Any) -> tuple[str, Iterator[list[Any]]]:
    """Returns the name and the rows of the first sheet that is shown and has values."""
    visible, kind = calamine.SheetVisibleEnum.Visible, calamine.SheetTypeEnum.WorkSheet
    shown = [sheet.name for sheet in book.sheets_metadata if sheet.visible == visible and sheet.typ == kind]
    for name in shown:
        sheet = book.get_sheet_by_name(name)
        if sheet.height:
            if len(shown) > 1:
                say_once(f"{path.name}: of {len(shown)} sheets {name!r} is read; save another sheet as its own file")
            return name, sheet.iter_rows()
    raise UserError(f"source {path}: all sheets are empty; the first row must name the columns")


def _rows(
    path: Path, name: str, rows: Iterator[list[Any]], wanted: Sequence[str], needed: int
) -> Iterator[list[Any] | Flaw]:
    header = [_text(value).strip() for value in next(rows)]
    check_header(path, header, wanted[:needed], " | ")
    found = columns_of(path, header, wanted, needed)
    places = [None if name is None else header.index(name) for name in found]
    for number, row in enumerate(rows, 2):
        if any(value != "" for value in row):
            try:
                yield ["" if place is None else text_of(_text(row[place])) for place in places]
            except ValueError as e:
                yield Flaw("malformed_row", f"row {number} of sheet {name!r} {e}")


def _text(value: Any) -> str:
    """Returns a value as its sheet shows it: whole numbers, which are stored as any, without a fraction."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
