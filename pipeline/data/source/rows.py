"""The captions beside an image, and files of rows as they were read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.source.child import Budget, ListReader
from pipeline.data.source.columns import KNOWN, LIMIT, Flaw
from pipeline.data.source.encoding import decoded
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import FileSource, ListRow, flawed
from pipeline.data.source.text import parsed_object
from pipeline.errors import UserError
from pipeline.graph.artifacts import ShardRow, read_table
from pipeline.ledger import REASONS
from pipeline.progress import say_once
from pipeline.store import Store

SIDECARS = ("txt", "caption", "json")  # extensions of what holds the captions of an image, the first that is there
CAPTIONS = ("caption", *KNOWN["caption"])  # where a sidecar in JSON has them, the first that is there
ROWS_SUFFIX = ".rows"  # ends the name of a file of rows as they were read (see write_rows)


def sidecar_row(url: str, sidecars: Mapping[str, tuple[bytes, str]], encoding: str, by_line: bool) -> ListRow:
    """Returns a row with the captions of what lies beside its image.

    Args:
        url: Reference of the image.
        sidecars: First bytes, one more than LIMIT at most, and name of each by its extension. Of the first of
            SIDECARS that is there each paragraph is a caption, or of JSON the value of the first of CAPTIONS.
        encoding: Encoding of text that is not UTF-8.
        by_line: Whether each line is a caption, and not each paragraph.
    """
    extension = next((extension for extension in SIDECARS if extension in sidecars), None)
    if extension is None:
        return ListRow(url, ())
    data, path = sidecars[extension]
    where = path.encode("utf-8", "backslashreplace").decode()
    if len(data) > LIMIT:
        return ListRow(url, (), reject="malformed_row", flaw=f"{where} has over {LIMIT:,} bytes")
    try:
        text = decoded(data, encoding)
    except UnicodeDecodeError as e:
        said = f"0x{data[e.start]:02x}, which is not {encoding or 'UTF-8'}"
        flaw = f"byte {e.start + 1} of {where} is {said}; source.encoding names another encoding"
        return ListRow(url, (), reject="not_utf8", flaw=flaw)
    if extension != "json":
        return ListRow(url, one_line_each(text.splitlines() if by_line else _paragraphs(text)))
    found = parsed_object(text)
    if isinstance(found, str):
        return ListRow(url, (), reject="malformed_row", flaw=f"{where} {found}")
    said = next((value for name in CAPTIONS if (value := found.get(name))), "")
    lines = said if isinstance(said, list) else [said]
    try:
        "".join(lines).encode()
    except (TypeError, UnicodeEncodeError):
        return ListRow(url, (), reject="malformed_row", flaw=f"{where} has a caption that is not text")
    return ListRow(url, one_line_each(lines))


def _paragraphs(text: str) -> list[str]:
    """Returns the parts of a text between its empty lines."""
    found = [list(lines) for said, lines in groupby(text.splitlines(), lambda line: bool(line.strip())) if said]
    if any(len(lines) > 1 for lines in found):
        say_once("lines of a text beside an image are one caption up to an empty line; source.caption_lines parts them")
    return [" ".join(lines) for lines in found]


def one_line_each(lines: Iterable[str | None]) -> tuple[str, ...]:
    """Returns texts on one line each, without those that are empty."""
    return tuple(text for line in lines if line and (text := " ".join(line.split())))


def sidecar(
    file: BinaryIO, path: Path, budget: Budget, extension: str, encoding: str, by_line: bool
) -> Iterator[list[Any] | Flaw]:
    """Yields the captions in a file beside an image as a row, in the child process of a list; none if it is empty."""
    if data := file.read(LIMIT + 1):
        row = sidecar_row("", {extension: (data, str(path))}, encoding, by_line)
        yield Flaw(row.reject, row.flaw) if row.reject else [None, list(row.captions)]


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
                f"source {self.file}: not a file of rows as a package holds them ({said}); name the list"
            ) from None


def written_rows(file: pa.NativeFile) -> Iterator[ListRow]:
    """Yields the rows that ``write_rows`` has written into the store."""
    for batch in pq.ParquetFile(file).iter_batches(batch_size=10_000):
        for row in batch.to_pylist():
            yield ListRow(**{**row, "captions": tuple(row["captions"])})


def read_captions(store: Store, shard: ShardRow) -> dict[str, list[str]]:
    """Returns the captions of a shard's rows, by key."""
    return dict(zip(*read_table(store, shard.blobs["captions"]).to_pydict().values(), strict=True))
