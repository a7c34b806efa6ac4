"""Compares the figures of two bundles, measured on the same rows and seeds, by a paired test.

Every row is its own control: the interval is that of the mean difference over groups of rows, not of two means.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CorruptObject
from pipeline.evaluate.figure import DOCUMENT
from pipeline.graph.artifacts import Artifact, load_artifact, made_with
from pipeline.graph.keys import recipe_changes
from pipeline.store import Store
from pipeline.store.records import read_blob

log = logging.getLogger("unclip")
Figures = dict[tuple[str, str], Mapping[str, Any]]


@dataclass(frozen=True)
class EvaluatedBundle:
    """Holds an evaluation, the bundle that it measured, and its evaluation.json."""

    evaluation: Artifact
    bundle: Artifact
    document: Mapping[str, Any]

    @property
    def figures(self) -> Figures:
        """Returns the figures of the evaluation, by model and name."""
        return {(figure["model"], figure["name"]): figure for figure in self.document["figures"]}


@dataclass(frozen=True)
class Change:
    """Compares one figure of two bundles.

    Attributes:
        model: Model that the figure measures.
        name: Name of the figure.
        then: Mean for the first bundle.
        now: Mean for the second bundle.
        difference: Mean over rows of the second minus the first.
        interval: 95% interval of the difference, over groups of rows.
        rows: Number of rows that both have.
        better: Side of its baseline on which the figure should be, "above" or "below".
    """

    model: str
    name: str
    then: float
    now: float
    difference: float
    interval: tuple[float, float]
    rows: int
    better: str

    @property
    def gain(self) -> tuple[float, float]:
        """Returns the interval of the gain, above 0 for better."""
        low, high = self.interval
        return (low, high) if self.better == "above" else (-high, -low)

    @property
    def verdict(self) -> str:
        """Returns "better" or "worse" if the difference is beyond chance, else ""."""
        return "better" if self.gain[0] > 0 else "worse" if self.gain[1] < 0 else ""


def load_measured(store: Store, evaluation: Artifact) -> EvaluatedBundle | None:
    """Returns an evaluation with its bundle; None if the bundle is gone or, with a warning, if it is damaged."""
    bundle = load_artifact(store, "bundle", evaluation.inputs["bundle"])
    if bundle is None:
        return None
    try:
        return EvaluatedBundle(evaluation, bundle, json.loads(read_blob(store, evaluation.blobs[DOCUMENT])))
    except CorruptObject as e:  # a damaged evaluation of the release must not block every later promotion
        log.warning("%s; its evaluation is left out of the comparison", e)
        return None


def evaluations(store: Store, bundle: str) -> list[EvaluatedBundle]:
    """Returns all evaluations of a bundle (its key), newest first. Reads each evaluation's record in the store."""
    made = made_with(store, "evaluation", "bundle", bundle)
    return [found for artifact in made if (found := load_measured(store, artifact)) is not None]


def find_comparable(found: Iterable[EvaluatedBundle], new: EvaluatedBundle) -> EvaluatedBundle | None:
    """Returns the first of these evaluations that is comparable with ``new``."""
    return next((old for old in found if not obstacles(old, new)), None)


def same_clip(old: Artifact, new: Artifact) -> bool:
    """Returns whether two bundles were trained with the same CLIP; else their figures cannot be compared."""
    return old.inputs.get("clip") == new.inputs.get("clip")


def obstacles(old: EvaluatedBundle, new: EvaluatedBundle) -> list[str]:
    """Returns why figures of two evaluations cannot be compared: another way to measure, or other rows."""
    then, now = old.document, new.document
    why = []
    if then["version"] != now["version"]:
        why.append(f"version {then['version']} -> {now['version']} of the evaluation")
    if not same_clip(old.bundle, new.bundle):
        why.append("another CLIP")
    why += [f"evaluation.{change}" for change in recipe_changes(then["recipe"], now["recipe"])]
    for part in sorted(then["rows"].keys() & now["rows"].keys()):
        before, after = then["rows"][part], now["rows"][part]
        if before != after:
            shared = len(set(before["keys"]) & set(after["keys"]))
            which = f"{shared} of them shared" if before["keys"] != after["keys"] else "with other captions"
            why.append(f"rows of {part}: {len(before['keys'])} -> {len(after['keys'])}, {which}")
    return why


def changes(old: EvaluatedBundle, new: EvaluatedBundle) -> list[Change]:
    """Returns every figure that both have row by row, in the order of the new evaluation."""
    import torch  # and statistics, which loads it: release list and rollback do without

    from pipeline.evaluate.statistics import interval

    then, found = old.figures, []
    for (model, name), figure in new.figures.items():
        before, after = (then.get((model, name)) or {}).get("values"), figure.get("values")
        # None stands for a value that was not finite.
        if not before or not after or len(before) != len(after) or None in (*before, *after):
            continue
        rows = torch.tensor([before, after], dtype=torch.float64)
        difference = rows[1] - rows[0]
        mean, around = float(difference.mean()), interval(difference, figure["groups"], seed=0)
        means = float(rows[0].mean()), float(rows[1].mean())
        found.append(Change(model, name, *means, mean, (around.low, around.high), len(difference), figure["better"]))
    return found
