"""Lists of prompts: a text file with one a line, or a column of a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types as t

from pipeline.data.source.columns import Flaw
from pipeline.data.source.parsers.text import parsed_object
from pipeline.data.source.tables import table_rows
from pipeline.errors import UserError
from pipeline.local import open_local

COLUMNS = ("prompt", "caption", "text")  # the first of these that a table has, whatever its case
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLES = (*DELIMITERS, ".jsonl", ".parquet")
KINDS = f".txt with a prompt a line, or a {', '.join(TABLES[:-1])} or {TABLES[-1]} with a column of them"
SEED = "seed"
TEXT = (t.is_string, t.is_large_string, t.is_string_view)
LARGEST_SEED = 2**63 - 1
Row = Mapping[str, Any] | str  # a string is the reason why a row cannot be read


def find_column(path: Path, asked: str | None = None) -> str | None:
    """Returns the column of a table that holds the prompts, ``asked`` or one with a known name; None for a text file.

    Raises UserError for a file of another kind, one that cannot be read, and one without that column.
    """
    kind = path.suffix.lower()
    if kind not in (".txt", *TABLES):
        raise UserError(f"{path}: not a list of prompts; give a {KINDS}")
    with _refusing(path):
        open_local(path).close()  # refuses a pipe, which csv and pyarrow would wait for
    if kind == ".txt":
        if asked:
            raise UserError(f"{path}: a text file has no column {asked}; leave --column out")
        return None
    with _refusing(path):
        names = _names(path)
    known = [name for word in COLUMNS for name in names if name.lower() == word]
    found = [name for name in names if name == asked] if asked else known
    if not found:
        wanted = asked or f"{', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
        raise UserError(f"{path}: no column {wanted}; it has {', '.join(names) or 'none'}; name one with --column")
    return found[0]


def read_prompts(path: Path, seed: int, size: int, column: str | None = None) -> Iterator[dict[str, list[Any]]]:
    """Yields parts of at most ``size`` rows, in order: columns "key", "prompt", "seed" and "reject".

    Row i has the key of its number, ten digits, and the seed ``seed`` + i, unless a table has a column "seed". A row
    that cannot be drawn has the reason why in "reject", all others None. Of a text file, empty lines are not rows.
    Raises UserError as ``find_column`` does, and for a list without a row.
    """
    column = find_column(path, column)
    number = 0
    with _refusing(path):
        rows = _lines(path) if column is None else _table(path, column)
        while block := list(islice(rows, size)):
            part: dict[str, list[Any]] = {"key": [], "prompt": [], "seed": [], "reject": []}
            for row in block:
                checked = (f"{number:010d}", *_checked(row, seed + number))
                for values, value in zip(part.values(), checked, strict=True):
                    values.append(value)
                number += 1
            yield part
    if number == 0:
        raise UserError(f"{path}: no prompts in it")


def _checked(row: Row, seed: int) -> tuple[str, int, str | None]:
    """Returns the prompt of a row, its seed, and why it cannot be drawn."""
    if isinstance(row, str):
        return "", seed, row
    prompt, own = row["prompt"], row.get(SEED)
    if isinstance(prompt, list):  # several captions of one image: the first
        prompt = prompt[0] if prompt else None
    try:
        text = prompt.decode() if isinstance(prompt, bytes) else "" if prompt is None else prompt
        text.encode()
        own = own.decode() if isinstance(own, bytes) else own
        own = seed if own in (None, "") else int(own) if isinstance(own, float) and own.is_integer() else int(str(own))
    except UnicodeError:
        return "", seed, "not_utf8"
    except (ValueError, AttributeError):  # a seed that is not a whole number, a prompt that is not text
        return "", seed, "malformed_row"
    if not 0 <= own <= LARGEST_SEED:
        return "", seed, "malformed_row"
    return text.strip(), own, None if text.strip() else "no_caption"


def _lines(path: Path) -> Iterator[Row]:
    for line in _utf8(path):
        if line is None or line.strip():
            yield "not_utf8" if line is None else {"prompt": line}


def _names(path: Path) -> list[str]:
    """Returns the columns of a table: of a .jsonl file, the names in its first row that can be parsed."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return pq.read_schema(path).names
    if kind == ".jsonl":
        return next((list(row) for row in _objects(path) if not isinstance(row, str)), [])
    with open_local(path) as file, io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as lines:
        return next(csv.reader(lines, delimiter=DELIMITERS[kind]), [])


def _table(path: Path, column: str) -> Iterator[Row]:
    """Returns rows with "prompt", and "seed" where the table has one."""
    rows = {".parquet": _parquet, ".jsonl": _jsonl}.get(path.suffix.lower(), _delimited)
    return rows(path, column)


def _parquet(path: Path, column: str) -> Iterator[Row]:
    file = pq.ParquetFile(path)
    wanted = [name for name in dict.fromkeys((column, SEED)) if name in file.schema_arrow.names]
    for batch in file.iter_batches(columns=wanted, batch_size=1024):
        # As bytes: pyarrow raises for a batch with one value that is not UTF-8, and that row alone is to be rejected.
        columns = [c.cast(pa.large_binary()) if any(is_it(c.type) for is_it in TEXT) else c for c in batch.columns]
        for row in pa.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist():
            yield {"prompt": row[column], SEED: row.get(SEED)}


def _jsonl(path: Path, column: str) -> Iterator[Row]:
    for row in _objects(path):
        yield row if isinstance(row, str) else {"prompt": row.get(column), SEED: row.get(SEED)}


def _objects(path: Path) -> Iterator[Row]:
    for row in _lines(path):
        found = row if isinstance(row, str) else parsed_object(row["prompt"])
        yield row if isinstance(row, str) else "malformed_row" if isinstance(found, str) else found


def _delimited(path: Path, column: str) -> Iterator[Row]:
    for row in table_rows(path, [column], [SEED]):
        yield row.reason if isinstance(row, Flaw) else {"prompt": row[0], SEED: row[1]}


def _utf8(path: Path) -> Iterator[str | None]:
    """Returns the lines of a text file; None for one that is not UTF-8."""
    with open_local(path) as lines:
        for number, line in enumerate(lines):
            try:
                yield line.decode("utf-8" if number else "utf-8-sig")
            except UnicodeDecodeError:
                yield None


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turns what keeps a list from being read into a UserError."""
    try:
        open_local(path).close()  # before the readers of tables, which open a path themselves and would wait for a pipe
        yield
    except (OSError, csv.Error, pa.ArrowException) as e:
        why = getattr(e, "strerror", None) or " ".join(str(e).split())
        raise UserError(f"{path}: cannot be read ({why}); give a {KINDS}") from e
