"""Figures of validation."""

import pytest
import torch

from models.draw import Draw
from pipeline.training.tasks.figures import by_timestep


def test_losses_are_told_apart_by_timestep() -> None:
    """Every row is in the quarter of its own timestep, and the quarters make up the whole."""
    draws = [Draw([(1, 30)]), Draw([(2, 10), (3, 5)])]
    t = torch.cat([draw.integers("t", 50) for draw in draws])
    figures = by_timestep(t.float(), draws, 50)
    for i, (low, high) in enumerate([(0, 13), (13, 25), (25, 38), (38, 50)]):
        inside = t[(t >= low) & (t < high)]
        assert figures[f"loss_quarter_{i + 1}"] == pytest.approx(float(inside.float().mean()))
    assert len(figures) == 4


def test_a_quarter_without_rows_has_no_figure() -> None:
    draw = Draw([(1, 1)])
    (name,) = by_timestep(torch.ones(1), [draw], 8)
    assert name == f"loss_quarter_{int(draw.integers('t', 8)) // 2 + 1}"
