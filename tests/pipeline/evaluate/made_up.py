"""SplitRows and subjects that are made up, for figures whose right answer is known."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from models.cascade import UnCLIP
from pipeline.evaluate.metric import Metric
from pipeline.evaluate.recipe import EvaluationRecipe
from pipeline.evaluate.rows import SplitRows
from pipeline.evaluate.statistics import derangement
from pipeline.evaluate.subject import Subject


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(n: int, groups: int = 0, **batch: Tensor) -> SplitRows:
    """Returns n rows, each a group of its own or, with ``groups``, in so many groups of neighbours."""
    names = [f"{i}" for i in range(n)]
    of = [f"group {i * groups // n}" for i in range(n)] if groups else names
    captions = [f"caption {name}" for name in names]
    return SplitRows("test", names, [""] * n, of, captions, [None] * n, batch, derangement(captions))


def subject(metric: Metric, model: str, samples: int = 2, **unclip: Any) -> Subject:
    """Returns a model under a metric, in a bundle of no more than what is given."""
    recipe = EvaluationRecipe(samples=samples)
    return Subject(metric, model, cast(UnCLIP, SimpleNamespace(**unclip)), recipe, lambda note: None)
