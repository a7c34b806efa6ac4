"""Declares the records of the graph: shards, artefacts, runs and pins. Their fields are their schema."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from pipeline.ledger import StoredLedger
from pipeline.store.names import Digest, FileName, Part
from pipeline.store.records import Count, Record

ARTIFACT_NAME = re.compile(r"artifacts/(?P<stage>\w[\w.-]*)/(?P<key>\w[\w.-]*)\.json")
"""The path of an artefact's record."""
RUN_NAME = re.compile(r"runs/(?P<project>\w[\w.-]*)/(?P<number>[0-9]{8})-[0-9a-f]{8}\.json")
"""The path of a run's record. Its number is one above the highest that its project had, whatever clocks say."""


@dataclass(frozen=True, slots=True)
class Shard(Record):
    """Describes one shard of an artefact.

    Attributes:
        number: Number of the shard.
        key: Key of the shard.
        ledger: Counts of its rows, by how they ended.
        blobs: Digests of its files by name. Those called ``note.`` are beside the result, such as times: they may
            differ when the shard is made again.
        counts: Sums that later stages need without opening a blob.
        inputs: Keys of the shards that it was made from.
    """

    number: Count
    key: Part
    ledger: StoredLedger
    blobs: Mapping[FileName, Digest] = field(default_factory=dict)
    counts: Mapping[str, Count] = field(default_factory=dict)
    inputs: Mapping[str, Part] = field(default_factory=dict)

    @property
    def named(self) -> list[str]:
        return [*self.blobs.values()]

    def check(self, path: str) -> None:
        if not path.endswith(f"/{self.key}.json"):
            raise ValueError(f"it is the shard {self.key}")


@dataclass(frozen=True)
class Artifact(Record):
    """Describes an immutable result.

    ``blobs`` maps file names to sha256; ``shard_table`` is the blob that lists its shards. ``version`` is that of its
    stage, and ``by`` the user and the host that made it.
    """

    stage: Part
    key: Part
    inputs: Mapping[Part, Part]
    recipe: Mapping[str, Any]
    ledger: StoredLedger
    blobs: Mapping[FileName, Digest] = field(default_factory=dict)
    shard_table: Digest | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    times: Mapping[str, Annotated[FiniteFloat, Field(ge=0)]] = field(default_factory=dict)  # rates, too
    version: int | None = None
    by: Mapping[str, str] = field(default_factory=dict)

    @property
    def named(self) -> list[str]:
        return [*self.blobs.values(), *([self.shard_table] if self.shard_table else [])]

    def check(self, path: str) -> None:
        if path != artifact_path(self.stage, self.key):
            raise ValueError(f"it is the artefact {self.stage} {self.key}")
        if missing := {"finished", "seconds"} - self.times.keys():
            raise ValueError(f"times: no {min(missing)}")


def shard_path(stage: str, key: str) -> str:
    """Returns the path of a shard's record."""
    return f"shards/{stage}/{key}.json"


def artifact_path(stage: str, key: str) -> str:
    """Returns the path of an artefact's record."""
    return f"artifacts/{stage}/{key}.json"


@dataclass(frozen=True)
class PlannedStage:
    """Holds the plan of one stage in a run.

    ``trajectory`` and ``trunk`` are the keys under which a training keeps its checkpoints (see pipeline.graph.keys);
    ``lineage`` names the pin of a stage that can be pinned.
    """

    key: Part
    version: int
    recipe: Mapping[str, Any]
    inputs: Mapping[Part, Part]
    trajectory: Part | None = None
    trunk: Part | None = None
    lineage: Part | None = None


@dataclass(frozen=True)
class RunRecord(Record):
    """Holds the request of a run: every stage of its graph, and which of them it ``wanted``.

    ``forgettings`` counts those in the list's journal that it was planned with (see pipeline.data.source.journal).
    ``segments`` names the segments of that list (see pipeline.data.source.stage). ``package`` is the path of the code
    package that runs it; ``by`` the user, the host and the command.
    """

    project: Part
    stages: Mapping[Part, PlannedStage]
    forgettings: Count
    wanted: tuple[Part, ...]
    segments: tuple[Digest, ...] = ()
    by: Mapping[str, str] = field(default_factory=dict)
    package: Annotated[str, Field(pattern="^packages/[0-9a-f]{64}[.]zip$")] | None = None

    def check(self, path: str) -> None:
        name = RUN_NAME.fullmatch(path)
        if name is None or name["project"] != self.project:
            raise ValueError(f"its name is not that of a run of {self.project}")
        if unknown := sorted(set(self.wanted) - self.stages.keys()):
            raise ValueError(f"wanted: {unknown[0]} is not one of its stages")


@dataclass(frozen=True)
class Pin:
    """Holds the key that every plan of a lineage takes for its stage."""

    key: Part
