"""One model under one metric, and how its values are compared with a baseline."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.cascade import UnCLIP
from pipeline.evaluate.figure import NAMES, Figure
from pipeline.evaluate.metric import Metric
from pipeline.evaluate.recipe import EvaluationRecipe
from pipeline.evaluate.rows import SplitRows
from pipeline.evaluate.statistics import interval, numbered

EQUAL = 1e-4  # share of the baseline; rounding alone makes such a difference for a model that equals its baseline
ONE_GROUP = "its interval is over rows, as all are of one group"


@dataclass(frozen=True)
class Subject:
    """Holds a model, and the metric that measures it.

    Attributes:
        metric: Metric that measures it.
        model: Name of the model, which is that of its stage.
        unclip: All models of the bundle.
        recipe: Recipe of the evaluation, with the seed of all noise.
        tick: Called with a line of progress.
    """

    metric: Metric
    model: str
    unclip: UnCLIP
    recipe: EvaluationRecipe
    tick: Callable[[str], None]

    def figure(self, name: str = "", says: str = "", **fields: Any) -> Figure:
        """Returns a figure of the model with these fields, by default named as the metric is."""
        metric, model = self.metric, self.model
        claim = metric.name if metric.together else f"{metric.name}.{model}"
        text = metric.text.replace("{model}", NAMES.get(model, model))
        text = text[:1].upper() + text[1:]
        return Figure(claim, text, model, name or metric.name, says or model, better=metric.better, **fields)

    def compare(
        self, rows: SplitRows, value: Tensor, baseline: Tensor, name: str = "", says: str = "",
        groups: Sequence[Hashable] | None = None, at_least: float = -torch.inf, keep: bool = True, **more: Any,
    ) -> Figure:  # fmt: skip
        """Returns a figure that compares ``value`` [n] with ``baseline`` [n], row by row.

        It holds if the whole interval of the mean difference is on the better side of 0, by more than rounding, and
        the mean value above ``at_least``. ``groups`` are those of ``rows`` unless they are given. Values of rows are
        left out unless ``keep``; ``more`` are further fields of ``Figure``.
        """
        value, baseline = value.double().cpu(), baseline.double().cpu()
        groups = rows.groups if groups is None else groups
        found = interval(value - baseline, groups, self.recipe.seed)
        least = EQUAL * float(baseline.mean().abs())
        beyond = found.low > least if self.metric.better == "above" else found.high < -least
        known: dict[str, Any] = {
            "value": float(value.mean()),
            "baseline": float(baseline.mean()),
            "interval": (found.low, found.high),
            "holds": beyond and float(value.mean()) > at_least,
            "note": ONE_GROUP if found.by_rows else "",
        }
        if keep:
            known["values"] = tuple(float(f"{v:.6g}") for v in value.tolist())
            known["groups"] = tuple(numbered(groups).tolist())
        return self.figure(name, says, rows=len(value), split=rows.split, **known | more)


class MissingInput(Exception):
    """Raised where a metric's need is missing, with the reason, or without one where its claim does not apply."""
