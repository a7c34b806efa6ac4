"""Holds what a report is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from pipeline.graph.artifacts import Artifact, ShardRow, read_shards, read_table
from pipeline.report.images import Album
from pipeline.store import Store
from pipeline.store.records import read_blob


@dataclass(frozen=True)
class ComparedBundle:
    """The bundle to compare with, its name on the page, and the store that holds what it was made from."""

    name: str
    store: Store
    bundle: Artifact


@dataclass(frozen=True)
class ReportInput:
    """The artefacts that a report shows, and what decides how.

    Attributes:
        store: Store of the artefacts.
        artifacts: Artefacts that are made, by stage.
        album: Rule of which images may be shown, and budget of their bytes.
        folder: Folder that the report is written to, None where that is not known.
        other: Bundle to compare with; the project's release without one.
    """

    store: Store
    artifacts: Mapping[str, Artifact]
    album: Album = field(default_factory=Album)
    folder: Path | None = None
    other: ComparedBundle | None = None

    def of(self, store: Store) -> ReportInput:
        """Returns the same with another store to read from."""
        return replace(self, store=store)

    def read(self, blob: str) -> bytes:
        """Returns the bytes of a blob."""
        return read_blob(self.store, blob)

    def table(self, blob: str, columns: list[str] | None = None) -> pa.Table:
        """Returns a Parquet blob as a table."""
        return read_table(self.store, blob, columns)

    def shards(self, stage: str) -> dict[int, ShardRow]:
        """Returns the shards of a stage by number; none before it is made."""
        if stage not in self.artifacts:
            return {}
        return {shard.number: shard for shard in read_shards(self.store, self.artifacts[stage])}
