"""Metrics: claims about models and how they are measured, ours and those of installed packages. No torch here.

A package adds a metric by an entry point of the group ``unclip.metrics``; ``examples/add_metric.py`` is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from models.sampling_config import MODELS, PRIORS
from pipeline.errors import did_you_mean
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.recipe import EvaluationRecipe
from pipeline.plugins import broken, plugins

GROUP = "unclip.metrics"  # of entry points, each named as its metric
DRAWERS = (*PRIORS.values(), "decoder")  # models that draw the held-out captions at 64 px
Need = Literal["rows", "images", "drawn", "parts", "judge", "samples", "baselines"]


@dataclass(frozen=True)
class Metric:
    """A family of claims, and how their figures are measured.

    Attributes:
        name: Name of the family. A claim is called by it and, unless ``together``, by its model.
        text: Sentence that is claimed; ``{model}`` stands for the model.
        models: Models that are measured, one after another, of those that the bundle has.
        needs: Names of the arguments of ``measure``, in order; each is a method of ``Evaluation`` in ``run.py``.
        measure: Function of a ``Subject`` and the ``needs`` that returns the figures of one model.
        better: Side of its baseline on which a value should be.
        together: Figures of all models are one claim, in place of a claim each.
        version: Number that is raised when something else is measured; of users' metrics it is in the key.
    """

    name: str
    text: str
    models: tuple[str, ...]
    needs: tuple[Need, ...]
    measure: Callable[..., Iterable[Figure]]
    better: Literal["above", "below"] = "above"
    together: bool = False
    version: int = 1


def metrics_of_users() -> tuple[Metric, ...]:
    """Returns the metrics that installed packages add, by name. Raises UserError for one that cannot be used."""
    found = plugins(GROUP)
    for name, metric in found.items():
        if why := _wrong(name, metric):
            raise broken(GROUP, name, why)
    return tuple(found.values())


def _wrong(name: str, metric: Any) -> str:
    """Returns why an object cannot be used as a metric; "" where it can."""
    if not isinstance(metric, Metric):
        return "it is not an unclip.metrics.Metric"
    if metric.name != name:
        return f"it declares the metric {metric.name}, and both need one name"
    for what, values, known in (("models", metric.models, MODELS), ("needs", metric.needs, get_args(Need))):
        if unknown := [value for value in values if value not in known]:
            return f"{unknown[0]} is none of its possible {what}{did_you_mean(unknown[0], known)}"
    if {"samples", "baselines"} & {*metric.needs} and not {*metric.models} <= {*PRIORS.values()}:
        return "it needs samples of models other than priors"
    return ""


def names_with_versions(metrics: Iterable[Metric]) -> tuple[str, ...]:
    """Returns name and version of each."""
    return tuple(f"{metric.name} {metric.version}" for metric in metrics)


@dataclass(frozen=True)
class ExtendedRecipe(EvaluationRecipe):
    """The recipe of an evaluation with metrics of users.

    Attributes:
        metrics: Name and version of each.
    """

    metrics: tuple[str, ...] = ()


def with_metrics(recipe: EvaluationRecipe) -> EvaluationRecipe:
    """Returns the recipe with the metrics that installed packages add; the same if there are none. Raises UserError."""
    found = names_with_versions(metrics_of_users())
    return ExtendedRecipe(**asdict(recipe), metrics=found) if found else recipe
