"""The rows that curation rejected, as a table of a shard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa

from pipeline.graph.artifacts import write_table


class Rejected(NamedTuple):
    """A row that curation rejected, by its key, and the key of the earliest row that it is too near to, if any."""

    key: str
    reason: str
    near: str | None = None


def rejected_table(rows: Iterable[Rejected]) -> bytes:
    """Returns Parquet bytes of rejected rows in the order of their keys."""
    ordered = sorted(rows)
    columns = {name: pa.array([getattr(row, name) for row in ordered], pa.string()) for name in Rejected._fields}
    return write_table(columns)
