"""Writes rows as they were read, and reads them again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import islice
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
                f"source {self.file}: not a file of rows from a submitted package ({said}); name the list"
            ) from None


def stored_rows(references: pa.Table, captions: pa.Table) -> list[ListRow]:
    """Returns rows of a shard of the list from its two tables, each with how it was rejected.

    A split goes along if the list names it; else it is drawn again, by the same group or URL.
    """
    named = references["named"].to_pylist()
    plain = references.select([name for name in references.column_names if name not in ("named", "counted")])
    rows = zip(plain.to_pylist(), named, captions["captions"].to_pylist(), strict=True)
    return [
        ListRow(**row | {"split": row["split"] if kept else ""}, captions=tuple(texts)) for row, kept, texts in rows
    ]


def counted_of(references: pa.Table) -> list[str]:
    """Returns what the key of a shard counts of each image besides its reference: that it was replaced, or tried again.

    A table in which there is nothing of the kind has no such column.
    """
    there = "counted" in references.column_names
    return references["counted"].to_pylist() if there else [""] * references.num_rows


def read_captions(store: Store, shard: ShardRow) -> dict[str, list[str]]:
    """Returns the captions of a shard's rows, by key."""
    return dict(zip(*read_table(store, shard.blobs["captions"], ["key", "captions"]).to_pydict().values(), strict=True))
