"""The rows of a shard that curation rejected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pipeline.graph.shard_tables import write_table


class Rejected(NamedTuple):
    """A row's key, the reason, and the key of the earliest row that it is too near to, if that is why."""

    key: str
    reason: str
    near: str | None = None


def rejected_table(rows: Iterable[Rejected]) -> bytes:
    """Parquet bytes, in order of keys."""
    import pyarrow as pa

    ordered = sorted(rows)
    columns = {name: pa.array([getattr(row, name) for row in ordered], pa.string()) for name in Rejected._fields}
    return write_table(columns)
