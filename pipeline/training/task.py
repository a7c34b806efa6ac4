"""What the loop needs of a model that is trained. Imports neither Ray nor the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints, runtime_checkable

from torch import Tensor, nn

from models.losses import Losses
from models.random_streams import RandomStreams

if TYPE_CHECKING:
    from pipeline.graph.stages import Context

Batch = dict[str, Tensor]
Examples = Sequence[tuple[Batch, RandomStreams]]


class Task(Protocol):
    """Defines what a model reads, its loss and its validation. Every ``model`` given is one that ``model`` has made.

    Attributes:
        columns: Columns of a batch, of "image", "tokens", "image_embedding", "text_embedding".
        min_side: Least shorter side of the images that are trained on, in pixels.
        image_size: Side of the views in "image", in pixels.
        splittable: Losses of rows do not depend on other rows, so that a batch may be cut into micro-batches.
        validation_rows: Largest number of validation rows that are used.
        validation_batch: Rows of a validation batch.
    """

    columns: tuple[str, ...]
    min_side: int
    image_size: int
    splittable: bool
    validation_rows: int
    validation_batch: int

    def model(self, seed: int) -> nn.Module:
        """Returns a new model with random weights drawn from ``seed``."""

    def loss(self, model: Any, batch: Batch, rng: RandomStreams) -> Losses:
        """Returns the loss of each row."""

    def validate(self, model: Any, examples: Examples) -> dict[str, float]:
        """Returns metrics on validation rows, each batch with its own random numbers, always the same."""

    def save(self, model: Any, folder: Path) -> None:
        """Writes the model as the files of its artefact."""


@runtime_checkable
class Shardable(Task, Protocol):
    """Trains a model that may be sharded over the workers."""

    def empty(self) -> nn.Module:
        """Returns what ``model`` returns on the meta device, without values or memory."""


class Objective(nn.Module):
    """Computes a task's loss as a module, so that a data-parallel wrapper contains all of the model."""

    def __init__(self, task: Task, model: nn.Module):
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Batch, rng: RandomStreams) -> Losses:
        return self.task.loss(self.model, batch, rng)


@runtime_checkable
class Finishes(Task, Protocol):
    """Measures a model before it is published.

    Attributes:
        finish_rows: The number of training rows that are used.
        measured: Names of the statistics, among the model's weights.
    """

    finish_rows: int
    measured: tuple[str, ...]

    def finish(self, model: Any, examples: Examples) -> dict[str, Tensor]:
        """Returns statistics of the model on training rows, by the names in ``measured``."""

    def save(self, model: Any, folder: Path, statistics: dict[str, Tensor] | None = None) -> None:
        """Writes the model and its statistics as the files of its artefact."""


@runtime_checkable
class Prepares(Protocol):
    """Computes a part of its loss in the feed, beside the training."""

    def prepare(self, batch: Batch, rng: RandomStreams) -> Batch:
        """Returns columns in place of "image", uint8 [b, 3, s, s], on the CPU, that give the same loss with ``rng``.

        It is called in several threads at once, with some rows of a batch each.
        """


@runtime_checkable
class Contrastive(Protocol):
    """Compares its rows with those of all workers.

    Attributes:
        gather: Function that returns the rows of all workers and the place of the first own one; set by the worker.
        at_once: Rows that are encoded at once, 0 for all of a worker's; set by the worker.
        local_statistics: Batch norms of the model see only rows that are encoded at once.
    """

    gather: Callable[[Tensor], tuple[Tensor, int]]
    at_once: int
    local_statistics: bool


def takes_micro_batches(task: Task) -> bool:
    """Returns whether fewer rows at once than a worker's share make no other training."""
    return task.splittable or (isinstance(task, Contrastive) and not task.local_statistics)


@runtime_checkable
class Previews(Protocol):
    """Draws previews of ``preview_rows`` validation rows."""

    preview_rows: int

    def preview(self, model: Any, batch: Batch, rng: RandomStreams) -> Tensor:
        """Returns an image of what the model makes of some validation rows, uint8 [3, h, w]."""


def task_type(recipe: Any) -> type[Task]:
    """Returns the type of the tasks that a training's recipe names."""
    made: type[Task] = get_type_hints(import_module(f"pipeline.training.tasks.{recipe.task}").make)["return"]
    return made


def task_of(ctx: Context) -> Task:
    """Returns the task that a stage's recipe names. Raises UserError if the recipe does not fit its inputs."""
    return import_module(f"pipeline.training.tasks.{ctx.recipe.task}").make(ctx)
