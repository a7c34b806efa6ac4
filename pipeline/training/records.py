"""Declares the records of trainings: checkpoints. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, FiniteFloat

from pipeline.store.names import Digest, FileName, is_digest
from pipeline.store.records import Count, Record, Seconds


def _line(line: dict[str, Any]) -> dict[str, Any]:
    if type(line.get("samples")) is not int or not is_digest(line.get("preview", "0" * 64)):
        raise ValueError("a line without samples, or with a preview that is not a blob")
    return line


@dataclass(frozen=True)
class SavedJournal:
    """Holds the metrics of a training until its checkpoint (see pipeline.training.state.MetricsJournal)."""

    lines: list[Annotated[dict[str, Any], AfterValidator(_line)]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    steps: Count = 0


@dataclass(frozen=True)
class CheckpointRecord(Record):
    """Holds a training's state after ``samples`` samples: blobs of its parts, metrics, seconds by phase."""

    samples: Count
    attempt: Count
    seconds: Seconds
    laps: Mapping[str, FiniteFloat]
    journal: SavedJournal
    blobs: Mapping[FileName, Digest]

    @property
    def named(self) -> list[str]:
        return [*self.blobs.values(), *(line["preview"] for line in self.journal.lines if "preview" in line)]

    def check(self, path: str) -> None:
        if not path.endswith(f"/{self.samples:012d}-{self.attempt:04d}.json"):
            raise ValueError(f"it is the checkpoint at sample {self.samples} of attempt {self.attempt}")
