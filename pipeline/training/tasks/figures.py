"""What the tasks of several models share: how models are made and saved, validation metrics, previews."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.folder import save_model
from models.frozen_text import FrozenTower
from models.losses import Losses
from models.random_streams import RandomStreams
from pipeline.training.task import Batch, Examples


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Returns ``make()`` with random weights that depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


class FolderTask:
    """Trains a model that ``models.folder`` saves, with a loss a row.

    Attributes:
        tower: Text tower of the run's CLIP where the model reads it frozen.
    """

    splittable = True
    tower: FrozenTower | None = None

    def network(self) -> Any:
        """Returns a new network, with weights from torch's own generator."""
        raise NotImplementedError

    def start(self, model: Any) -> None:
        """Gives a new network what it begins with in place of random weights."""
        if self.tower is not None:
            self.tower.put_into(model)

    def model(self, seed: int) -> nn.Module:
        """Returns a new model whose random weights depend on ``seed`` alone."""
        model = seeded(self.network, seed)
        self.start(model)
        return model

    def empty(self) -> nn.Module:
        """Returns what ``model`` returns on the meta device, without values or memory."""
        with torch.device("meta"):
            return self.network()

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes the model as the files of its artefact."""
        save_model(folder, model)


def by_timestep(losses: Tensor, streams: Sequence[RandomStreams], steps: int) -> dict[str, float]:
    """Returns the mean of ``losses`` [rows] in each quarter of the timesteps; "loss_quarter_1" has the least noise.

    ``streams`` are those of the losses, batch after batch. A quarter without rows has no mean.
    """
    quarters = torch.cat([rng.integers("t", steps) for rng in streams]) * 4 // steps
    found = {int(quarter) for quarter in quarters.unique()}
    return {f"loss_quarter_{i + 1}": float(losses[quarters == i].mean()) for i in sorted(found)}


def conditional_figures(
    loss: Callable[[Batch, RandomStreams], Losses],
    examples: Examples,
    conditions: Sequence[str],
    steps: int | None = None,
) -> dict[str, float]:
    """Returns the mean "loss", also by timestep where a model has ``steps``, and how the conditions lower it.

    "condition_gap" is the mean rise of the loss when every row has the ``conditions`` of the row before it, the first
    those of the last, with the same noise and timesteps; "condition_gap_error" is its standard error. A model that
    ignores its conditions has a gap of 0.
    """
    true, wrong = [], []
    before = examples[-1][0]
    for batch, rng in examples:
        shifted = batch | {name: torch.cat([before[name][-1:], batch[name][:-1]]) for name in conditions}
        before = batch
        true.append(loss(batch, rng).total)
        wrong.append(loss(shifted, rng).total)
    rise = torch.cat(wrong) - torch.cat(true)
    error = float(rise.std()) / sqrt(len(rise)) if len(rise) > 1 else 0.0
    figures = {"loss": float(torch.cat(true).mean())}
    if steps is not None:
        figures |= by_timestep(torch.cat(true), [rng for _, rng in examples], steps)
    return figures | {"condition_gap": float(rise.mean()), "condition_gap_error": error}


def grid(*rows: Tensor) -> Tensor:
    """Returns rows of images, uint8 [n, 3, s, s] each, as one image uint8 [3, h, w], one row below the other."""
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
