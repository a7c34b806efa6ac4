"""Workers that write down what they do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.training import saved_tensors
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask


def noting(folder: Path, rank: int) -> None:
    """Writes down how many blobs of checkpoints a worker reads, how many rows it computes at once, and its models."""
    blob_parts, loss, make = saved_tensors.blob_parts, DiffusionPriorTask.loss, DiffusionPriorTask.model

    def note(name: str, line: object) -> None:
        with open(folder / f"{name}-{rank}", "a") as out:
            out.write(f"{line}\n")

    def read(*given: Any) -> Iterator[bytes]:
        note("read", given[1])
        return blob_parts(*given)

    def noted(self: Any, model: Any, batch: Any, draw: Any) -> Any:
        if model.training:
            note("rows", draw.rows)
        return loss(self, model, batch, draw)

    def made(self: Any, seed: int) -> Any:
        note("models", seed)
        return make(self, seed)

    saved_tensors.blob_parts = read
    DiffusionPriorTask.loss, DiffusionPriorTask.model = noted, made


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
