"""How far a set of drawn pictures is from a set of real ones, by their embeddings. None of it looks at captions."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.evaluate.figure import Figure
from pipeline.evaluate.paired import paired
from pipeline.evaluate.rows import HeldOut
from pipeline.evaluate.statistics import cmmd, frechet_distance
from pipeline.evaluate.whole import whole

NEIGHBOURS = 3


def covered(points: Tensor, of: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Whether each of ``points`` [n, d] lies within some ball around a row of ``of`` [m, d], bool [n].

    A row's ball reaches to the k-th nearest of the others (to the farthest, where there are fewer). So precision is the
    share of drawn rows that are covered by real ones, and recall the share of real ones that are covered by drawn ones
    (Kynkäänniemi et al. 2019). Raises ValueError for fewer than two rows.
    """
    if len(of) < 2:
        raise ValueError(f"{len(of)} rows have no neighbours")
    points, of = points.double(), of.double()
    own = torch.cdist(of, of).fill_diagonal_(torch.inf)
    reach = own.kthvalue(min(k, len(of) - 1), dim=1).values
    return (torch.cdist(points, of) <= reach).any(1)


def distribution_figures(
    model: str, eye: str, subject: str, end: str, drawn: Tensor, other: Tensor, real: Tensor, rows: HeldOut, seed: int
) -> list[Figure]:
    """CMMD, Fréchet distance, precision and recall of ``drawn`` [n, d] against ``real`` [n, d], the held-out pictures.

    The baseline is what ``other`` [n, d], as many real pictures that taught, have in the place of the drawn ones: no
    model need be better. ``eye`` names whose embeddings they are, ``subject`` what was drawn; names end on ``end``.
    """
    short = eye.lower()
    told = f"of {subject} pictures to real ones, by {eye}; baseline: training pictures"
    figures = [
        whole("f", model, f"{short}_{name}{end}", f"{says} {told}", distance(drawn, real), distance(other, real), rows)
        for name, says, distance in (("cmmd", "CMMD", cmmd), ("frechet", "Fréchet distance", frechet_distance))
    ]
    shares = {
        "precision": [covered(x, real) for x in (drawn, other)],
        "recall": [covered(real, x) for x in (drawn, other)],
    }
    for name, (ours, theirs) in shares.items():
        says = f"{name} {told}"
        figures.append(paired("f", model, f"{short}_{name}{end}", says, ours, theirs, rows, seed, None))
    return figures
