"""Are parts of an image those that its caption names? Compared with drawings of the truth, where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.sampling_config import BASE
from pipeline.data.source.drawings.world import PARTS, Drawing, draw, drawing_of
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.metric import DRAWERS, Metric
from pipeline.evaluate.rows import SplitRows, Tick
from pipeline.evaluate.subject import Subject
from pipeline.held_out import FEWEST
from pipeline.progress import counted

# Parts that share a claim: what fills an image, what is set on or around it, and what is small.
GROUPS = (("body", "plant", "colour", "ground"), ("top", "pot", "ring"), ("eyes", "mouth", "surface", "moon"))
MOST = 0.5  # a part that is wrong as often as right is not drawn, however far above chance that is


def truths(urls: Sequence[str]) -> list[Drawing | None]:
    """Returns the drawing that each image reference names; None for images whose truth cannot be drawn."""

    def truth(url: str) -> Drawing | None:
        try:
            return drawing_of(url)[0]
        except LookupError:
            return None

    return [truth(url) for url in urls]


class PartPrediction(NamedTuple):
    """Holds the value of a part that an image shows, as a classifier's prediction.

    Attributes:
        row: Place of the image's row.
        style: Style of the drawing, which has values of its own for the part.
        own: Place of the right value among all values.
        share: 1 at the value whose drawing is nearest to the image, equal shares where several are; fp64 [values].
    """

    row: int
    style: str
    own: int
    share: Tensor


PartPredictions = dict[tuple[str, str], list[PartPrediction]]  # by model and part


def read_parts(images: Mapping[str, Tensor], drawings: Sequence[Drawing | None], tick: Tick) -> PartPredictions:
    """Returns predictions by model and part: the nearest of the drawings that differ in that part alone.

    Args:
        images: Images by model, uint8 [n, 64, 64, 3].
        drawings: Truth of each row, None where there is none.
        tick: Function that shows progress.
    """
    found: PartPredictions = {}
    for row, drawing in enumerate(drawings):
        if drawing is None:
            continue
        truth = _drawn(drawing)
        for part, own in drawing.parts.items():
            values = list(PARTS[drawing.style][part])
            others = [truth if value == own else _drawn(drawing.replaced(part, value)) for value in values]
            candidates = torch.stack(others)
            for model, made in images.items():
                error = (candidates - made[row].float()).square().flatten(1).sum(1).double()
                nearest = (error == error.min()).double()
                one = PartPrediction(row, drawing.style, values.index(own), nearest / nearest.sum())
                found.setdefault((model, part), []).append(one)
        tick(f"{row + 1} of {len(drawings)} truths")
    return found


def _drawn(drawing: Drawing) -> Tensor:
    return torch.from_numpy(np.asarray(draw(drawing, BASE)).astype(np.float32))


def right(found: Sequence[PartPrediction]) -> tuple[Tensor, Tensor]:
    """Returns for each image whether it shows the right value, and how often it would for other rows, fp64 [n] each."""
    # Chance is the share of other rows of its style whose value the image shows, so that always drawing the commonest
    # value does not beat chance. Without other rows all values are equally likely.
    hits = torch.stack([one.share[one.own] for one in found])
    chance = []
    for i, one in enumerate(found):
        others = [other.own for j, other in enumerate(found) if j != i and other.style == one.style]
        chance.append(one.share[others].mean() if others else one.share.mean())
    return hits, torch.stack(chance)


def measure_parts(
    subject: Subject, known: tuple[PartPredictions, PartPredictions], rows: SplitRows, group: Sequence[str]
) -> Iterator[Figure]:
    """Yields for each part of a group whether images of ``rows`` show what their captions say.

    A figure is the share of images that are nearest to their truth, among drawings that differ from it in one part. It
    holds if that is more than half, and above chance. ``known`` has the predictions for images of ``rows``, and for
    those of training rows.
    """
    found, trained = known
    for part in group:
        ours, theirs = found.get((subject.model, part), []), trained.get((subject.model, part))
        if 0 < len(ours) < FEWEST:
            note = f"{counted(len(ours), f'{rows.split} row')}, and a figure needs {FEWEST}; add pairs"
            yield subject.figure(part, part, note=note, split=rows.split)
        elif ours:
            groups = [rows.groups[one.row] for one in ours]
            share = float(right(theirs)[0].mean()) if theirs else None
            yield subject.compare(rows, *right(ours), part, part, groups=groups, at_least=MOST, trained=share)


PARTS_DRAWN = tuple(
    Metric(
        f"parts_{group[0]}",
        f"{{model}} draws the {', '.join(group[:-1])} and {group[-1]} named in the caption",
        DRAWERS,
        ("parts", "images"),
        partial(measure_parts, group=group),
    )
    for group in GROUPS
)
