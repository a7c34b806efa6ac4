"""Writes rows as they were read, and reads them again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.source.columns import Flaw
from pipeline.data.source.reader import ListReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import FileSource, ListRow, flawed
from pipeline.errors import UserError
from pipeline.graph.artifacts import ShardRow, read_table
from pipeline.ledger import REASONS
from pipeline.store import Store
from pipeline.store.records import put_blob

MADE = "made"  # column of a table of captions: the first one was made for the row, and the list has the others
MADE_SHARE = "made_share"  # metric of such captions: the share of draws in which a training takes the first one
ROWS_SUFFIX = ".rows"  # ends the name of a file of rows as they were read (see write_rows)


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


def put_rows(store: Store, rows: Iterable[ListRow]) -> tuple[str | None, int]:
    """Stores rows as a blob. Returns it, None without a row, and their number."""
    with tempfile.NamedTemporaryFile() as file:
        count = write_rows(file, rows)
        file.flush()
        return (put_blob(store, Path(file.name)) if count else None), count


class PackagedRows(FileSource):
    """Holds rows as a job's package takes them along."""

    kind, suffixes = "rows", (ROWS_SUFFIX,)

    def rows(self, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        """Yields the rows of the file, which may be a stranger's. Raises UserError for any other file."""
        names, may = [field.name for field in fields(ListRow)], self.policy(recipe)
        try:
            for found in reader.rows("parquet", self.file, len(names), names, len(names)):
                if isinstance(found, Flaw):
                    yield flawed(found)
                    continue
                row: dict[str, Any] = dict(zip(names, found, strict=True))
                captions = row["captions"] if isinstance(row["captions"], list) else [row["captions"]]
                row = {name: value if isinstance(value, str) else "" for name, value in row.items()}
                reject = row["reject"] if row["reject"] in REASONS else may.refusal(row["url"])
                yield ListRow(**row | {"captions": tuple(filter(None, captions)), "reject": reject})
        except UserError as e:
            said = str(e).removeprefix(f"source {self.file}: ")
            raise UserError(
                f"source {self.file}: not a file of rows as a package holds them ({said}); name the list"
            ) from None


def written_rows(data: bytes) -> Iterator[ListRow]:
    """Yields the rows of a blob of ``put_rows``."""
    for batch in pq.ParquetFile(pa.BufferReader(data)).iter_batches(batch_size=10_000):
        for row in batch.to_pylist():
            yield ListRow(**{**row, "captions": tuple(row["captions"])})


def stored_rows(references: pa.Table, captions: pa.Table) -> list[ListRow]:
    """Returns rows of a shard of the list from its two tables, each with how it was rejected.

    A split goes along if the list names it; else it is drawn again, by the same group or URL.
    """
    named = references["named"].to_pylist()
    rows = zip(references.drop_columns("named").to_pylist(), named, captions["captions"].to_pylist(), strict=True)
    return [
        ListRow(**row | {"split": row["split"] if kept else ""}, captions=tuple(texts)) for row, kept, texts in rows
    ]


def read_captions(store: Store, shard: ShardRow) -> dict[str, list[str]]:
    """Returns the captions of a shard's rows, by key."""
    return dict(zip(*read_table(store, shard.blobs["captions"], ["key", "captions"]).to_pydict().values(), strict=True))
