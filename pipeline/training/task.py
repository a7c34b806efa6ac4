"""What the loop asks of a model that is trained. No Ray, no store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from models.draw import Draw
from models.losses import Losses

Batch = dict[str, Tensor]
Examples = Sequence[tuple[Batch, Draw]]


class Task(Protocol):
    """One model: what it reads, its loss, its validation.

    ``columns``: what a batch holds, of "image", "tokens", "image_embedding", "text_embedding". ``min_side``: rows
    whose short side is below it do not teach. ``image_size``: side of the views in "image". ``splittable``: whether
    the loss of a row is its own, so that a batch may be cut into micro-batches.
    ``validation_rows``: validation rows that are looked at, at most, in batches of ``validation_batch``.
    """

    columns: tuple[str, ...]
    min_side: int
    image_size: int
    splittable: bool
    validation_rows: int
    validation_batch: int

    def model(self, seed: int) -> nn.Module:
        """A new model, its random weights drawn from ``seed``."""

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> Losses:
        """The loss of each row."""

    def validate(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        """Figures on validation rows, each batch with the draw that is always its own."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the model as the files of its artefact."""


class Objective(nn.Module):
    """A task's loss as a module, so that a data-parallel wrapper sees all of the model at work."""

    def __init__(self, task: Task, model: nn.Module):
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Batch, draw: Draw) -> Losses:
        return self.task.loss(self.model, batch, draw)


@runtime_checkable
class Finishes(Task, Protocol):
    """A task that measures a model before it is published. ``finish_rows``: training rows that are looked at.
    ``measured``: names of what is found, among the model's weights."""

    finish_rows: int
    measured: tuple[str, ...]

    def finish(self, model: nn.Module, examples: Examples) -> dict[str, Tensor]:
        """Statistics of the model on training rows, by the names in ``measured``."""

    def save(self, model: nn.Module, folder: Path, statistics: dict[str, Tensor] | None = None) -> None:
        """Write the model and its statistics as the files of its artefact."""


@runtime_checkable
class Contrastive(Protocol):
    """A task whose rows are compared with those of all workers. ``gather`` is set by the worker. With
    ``local_statistics`` the model's norms know the rows of one worker only."""

    gather: Callable[[Tensor], tuple[Tensor, int]]
    local_statistics: bool


@runtime_checkable
class Previews(Protocol):
    """A task whose progress can be seen. ``preview_rows``: how many validation rows are drawn."""

    preview_rows: int

    def preview(self, model: nn.Module, batch: Batch, draw: Draw) -> Tensor:
        """A picture of what the model makes of some validation rows, uint8 [3, h, w]."""
