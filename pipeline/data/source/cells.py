"""Reads images inside of Parquet files, as Hugging Face's datasets holds them; each is named by its row.

A reference names the row group with its size in bytes, so that rows of a file that was replaced are other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, repeat
from operator import itemgetter
from pathlib import Path

from pipeline.data.fetch.references import part_of
from pipeline.data.source.columns import Flaw
from pipeline.data.source.reader import ListReader
from pipeline.errors import UserError
from pipeline.local import PathPolicy, reason_of
from pipeline.progress import say_once


def read_cells(references: Sequence[str], most: int, within: PathPolicy) -> Iterator[bytes | str]:
    """Yields the bytes of each image, at most ``most``, or the reason of pipeline.ledger why there are none."""
    with ListReader() as reader:
        for (path, column), cells in groupby(map(_cell, references), itemgetter(0)):
            places = [place for _, place in cells]
            if not path:
                yield from repeat("unsupported_reference", len(places))
                continue
            missing, came = "budget_spent", 0
            try:
                for found in reader.rows("cells", Path(path), 0, column, places, most, within=within):
                    came += 1
                    if came > len(places):  # of a child that was taken over
                        break
                    yield found.reason if isinstance(found, Flaw) else found
            except OSError as e:
                missing = reason_of(e)
            except UserError as e:
                say_once(str(e))
                missing = "decode_error"
            yield from repeat(missing, len(places) - came)


def _cell(reference: str) -> tuple[tuple[str, str], list[int]]:
    """Returns file and column of a reference, and its row group, the bytes of that, and its row; "" for no such."""
    path, query, place = part_of(reference, "group", "size", "row") or ("", {}, [])
    column = query.get("column", "")
    return (path, column) if path and column else ("", ""), place
