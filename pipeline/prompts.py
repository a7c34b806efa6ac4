"""Lists of prompts: a text file with one a line, or a Parquet file with a column of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

COLUMNS = ("prompt", "caption")  # of a Parquet file, the first that is there


def read_prompts(path: Path, seed: int, size: int) -> Iterator[dict[str, list[Any]]]:
    """Parts of at most ``size`` rows, in order: columns "key", "prompt" and "seed".

    Row i has the key of its number, ten digits, and the seed ``seed`` + i, unless a Parquet file has a column "seed".
    Of a text file, empty lines are no rows. Raises UserError for a file that cannot be read, and for seeds below 0.
    """
    number, part = 0, {"key": [], "prompt": [], "seed": []}  # type: ignore[var-annotated]
    for row in _rows(path):
        own = seed + number if row.get("seed") is None else row["seed"]
        if own < 0:
            raise UserError(f"{path}: row {number + 1} has the seed {own}, which is below 0")
        for name, value in (("key", f"{number:010d}"), ("prompt", row["prompt"] or ""), ("seed", own)):
            part[name].append(value)
        number += 1
        if len(part["key"]) == size:
            yield part
            part = {name: [] for name in part}
    if part["key"]:
        yield part
    if number == 0:
        raise UserError(f"{path}: no prompts in it")


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if path.suffix == ".parquet":
            yield from _of_parquet(path)
            return
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                if text := line.strip():
                    yield {"prompt": text}
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e}); give a UTF-8 text file, a prompt a line, or a .parquet") from e


def _of_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        column = next((name for name in COLUMNS if name in names), None)
        if column is None:
            raise UserError(f"{path}: no column {' or '.join(COLUMNS)}; it has {', '.join(names)}")
        wanted = [column] + (["seed"] if "seed" in names else [])
        for batch in file.iter_batches(columns=wanted, batch_size=1024):
            for row in batch.cast(
                pa.schema([(n, pa.int64() if n == "seed" else pa.string()) for n in wanted])
            ).to_pylist():
                yield {"prompt": row[column], "seed": row.get("seed")}
    except pa.ArrowException as e:
        raise UserError(f"{path}: cannot be read as Parquet ({' '.join(str(e).split())})") from e
