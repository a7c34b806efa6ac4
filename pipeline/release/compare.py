"""Compares the figures of two bundles, measured on the same rows and seeds, and says what differs beyond chance.

Every row is its own control: the interval is that of the mean difference over rows, not of two means.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import Artifact, artifact_path, load_artifact, made_with
from pipeline.graph.damage import set_aside
from pipeline.graph.keys import recipe_changes
from pipeline.store import Store
from pipeline.store.records import read_blob

log = logging.getLogger("unclip")
Figures = dict[tuple[str, str], Mapping[str, Any]]
OTHERS = re.compile(r".+_early_.+|.+(?<!_trained)_early")  # of an earlier checkpoint, which is not what is released
REAL = re.compile(r".+_real_.+")  # rankings whose values are those of real images
RANKED = re.compile(r"(.+_trained)_(early|shuffled)")
OTHER_CLIP = "another CLIP"
OF_CODES = "nats_"  # figures that another codec measures by another yardstick


@dataclass(frozen=True)
class Measured:
    """An evaluation, the bundle that it measured, and its evaluation.json."""

    evaluation: Artifact
    bundle: Artifact
    document: Mapping[str, Any]

    @property
    def figures(self) -> Figures:
        """Returns what the evaluation says of the bundle itself, by model and name.

        A ranking is named by its upper end: trained models stand above an early checkpoint where there is one, and
        directly above shuffled captions where not.
        """
        found: Figures = {}
        for figure in self.document["figures"]:
            name = figure["name"]
            if not OTHERS.fullmatch(name):
                ranked = RANKED.fullmatch(name)
                found[figure["model"], ranked[1] if ranked else name] = figure
        return found


@dataclass(frozen=True)
class Change:
    """One figure of two bundles.

    Attributes:
        model: The model that it measures.
        name: The name of the figure.
        then: Its mean for the first bundle.
        now: Its mean for the second.
        difference: The mean over rows of the second minus the first.
        interval: The 95% interval of the difference.
        rows: How many rows both have.
        claim: On which side of its baseline the figure should be; None if nothing was claimed.
    """

    model: str
    name: str
    then: float
    now: float
    difference: float
    interval: tuple[float, float]
    rows: int
    claim: str | None

    @property
    def gain(self) -> tuple[float, float]:
        """Returns the interval of what was gained, above 0 for better; infinitely wide if nothing was claimed."""
        low, high = self.interval
        return {"above": (low, high), "below": (-high, -low)}.get(self.claim or "", (-inf, inf))

    @property
    def verdict(self) -> str:
        """Returns "better", "worse" or "changed" if the difference is beyond chance, else ""."""
        low, high = self.interval
        if not (low > 0 or high < 0):
            return ""
        return "changed" if self.claim is None else "better" if self.gain[0] > 0 else "worse"


def load_measured(store: Store, evaluation: Artifact) -> Measured | None:
    """Returns an evaluation with what it measured, or None if one of them has gone.

    A damaged evaluation is set aside with a warning, so that the next run makes it again, unless a release names it.
    """
    bundle = load_artifact(store, "bundle", evaluation.inputs["bundle"])
    if bundle is None:
        return None
    try:
        return Measured(evaluation, bundle, json.loads(read_blob(store, evaluation.blobs["evaluation.json"])))
    except CorruptObject as e:
        log.warning("%s; the evaluation that names it is not compared with", e)
        try:
            set_aside(store, [e.path, artifact_path(evaluation.stage, evaluation.key)])
        except UserError as why:
            log.warning("%s", why)
        return None


def evaluations(store: Store, bundle: str) -> list[Measured]:
    """Returns all evaluations of a bundle (its key), newest first. Reads each evaluation's record in the store."""
    made = made_with(store, "evaluation", "bundle", bundle)
    return [found for artifact in made if (found := load_measured(store, artifact)) is not None]


def find_comparable(found: Iterable[Measured], new: Measured) -> Measured | None:
    """Returns the first of them that was measured as ``new`` was."""
    return next((old for old in found if not obstacles(old, new)), None)


def obstacles(old: Measured, new: Measured) -> list[str]:
    """Returns why figures of two evaluations cannot be compared: another way to measure, or other rows."""
    then, now = old.document, new.document
    why = []
    if then["version"] != now["version"]:
        why.append(f"version {then['version']} -> {now['version']} of the evaluation")
    if old.bundle.inputs.get("clip") != new.bundle.inputs.get("clip"):
        why.append(OTHER_CLIP)
    # What an early checkpoint is, only the figures know that are not compared.
    recipes = ({k: v for k, v in document["recipe"].items() if k != "early"} for document in (then, now))
    why += [f"evaluation.{change}" for change in recipe_changes(*recipes)]
    for part in sorted(then["rows"].keys() & now["rows"].keys()):
        before, after = then["rows"][part], now["rows"][part]
        if before != after:
            shared = len(set(before["keys"]) & set(after["keys"]))
            which = f"{shared} of them shared" if before["keys"] != after["keys"] else "with other captions"
            why.append(f"rows of {part}: {len(before['keys'])} -> {len(after['keys'])}, {which}")
    return why


def changes(old: Measured, new: Measured) -> list[Change]:
    """Returns every figure that both have row by row, in the order of the new evaluation."""
    import torch

    from pipeline.evaluate.metrics import bootstrap, numbered

    same_codec = old.bundle.inputs.get("codec") == new.bundle.inputs.get("codec")
    then, found = old.figures, []
    for (model, name), figure in new.figures.items():
        before, after = (then.get((model, name)) or {}).get("values"), figure.get("values")
        if not before or not after or len(before) != len(after) or None in (*before, *after):
            continue
        if REAL.fullmatch(name) or (name.startswith(OF_CODES) and not same_codec):
            continue
        rows = torch.tensor([before, after], dtype=torch.float64)
        difference = rows[1] - rows[0]
        mean, interval = float(difference.mean()), bootstrap(difference, numbered(range(len(difference))), seed=0)
        means = float(rows[0].mean()), float(rows[1].mean())
        found.append(Change(model, name, *means, mean, interval, len(difference), figure["claim"]))
    return found
