"""Are things told apart by their names? What is measured where style and background cannot help.

Rows are compared only with rows of equal style and background, so that a model that knows palettes and no names is
right as often as chance is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluate.captions import Phrases
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.gap import ERRORS
from pipeline.evaluate.paired import paired, rounded, whole
from pipeline.evaluate.quality import Eye
from pipeline.evaluate.retrieval import TIE, ranks
from pipeline.evaluate.rows import HeldOut
from pipeline.held_out import FEWEST
from pipeline.progress import counted

CHANCE = 0.5
FIRST = 10  # places among which the right image is looked for


class Apart(NamedTuple):
    """How well rows are told apart from the others of their group.

    Attributes:
        share: For each row that has others in its group, how many of these score lower than the row itself, as a share
            from 0 to 1; fp64 [m], group by group.
        error: The standard error of the mean share where nothing is known.
        groups: How many groups have two rows or more.
    """

    share: Tensor
    error: float
    groups: int


def told_within(scores: Tensor, groups: Sequence[Hashable | None]) -> Apart:
    """Returns how often ``scores`` [n, n] of query i and target i is above those of query i and others of its group.

    The share of a row is a rank, from 0 to 1, ties count by half, and the mean over rows is the area under the ROC
    curve within groups: 0.5 by chance, 1 where every row is found. The error is exact: where the queries of a group
    know nothing of their targets, every assignment of targets to queries is as likely, and the variance of the sum of
    n numbers a(i, p(i)) over all permutations p is the sum of squares of a(i, j), centred by rows and columns, over
    n - 1 (Hoeffding 1951, "A combinatorial central limit theorem"). So targets that attract every query add no false
    certainty. A group of None, or of one row, does not count.
    """
    places: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        if group is not None:
            places.setdefault(group, []).append(i)
    inside = [torch.tensor(group) for group in places.values() if len(group) > 1]
    shares, variance = [torch.zeros(0, dtype=torch.float64)], 0.0
    for group in inside:
        s, n = scores[group][:, group].double().cpu(), len(group)
        apart = (row[:, None] - row for row in s)  # of targets j and k, a query at once: n numbers squared, not cubed
        wins = torch.stack([((x > TIE).double() + (x.abs() <= TIE).double() / 2).sum(1) for x in apart])
        share = (wins - 0.5) / (n - 1)  # a target ties with itself
        centred = share - share.mean(0) - share.mean(1, keepdim=True) + share.mean()
        variance += float(centred.square().sum()) / (n - 1)
        shares.append(share.diagonal())
    known = torch.cat(shares)
    return Apart(known, variance**0.5 / max(1, len(known)), len(inside))


def too_few_alike(rows: int, split: str) -> str:
    """Returns why so few rows of a split that have another one of equal style and background give no figure."""
    return f"{counted(rows, f'{split} row')} of equal style and background, and it takes {FEWEST}; add pairs"


def apart_figures(
    line: str, model: str, name: str, says: str, scores: Tensor, phrases: Phrases, rows: HeldOut, claim: bool = True
) -> list[Figure]:
    """Returns how often rows are told apart from others of equal style and background, by ``scores`` [n, n].

    The figure holds if that is above chance by three standard errors. It is not measured with fewer than FEWEST rows
    that have others beside them, or with so few that not even all right would hold. With ``claim`` False it is for
    information, or left out.
    """
    found = told_within(scores, [phrases.group(caption) for caption in rows.captions])
    several = len(found.share)
    why = ""
    if several < FEWEST:
        why = too_few_alike(several, rows.split)
    elif ERRORS * found.error >= 1 - CHANCE:
        chance = f"chance gives {CHANCE} ± {ERRORS * found.error:.2f}"
        why = f"{several} {rows.split} rows in {found.groups} styles and backgrounds are too few: {chance}; add pairs"
    if why:
        return [Figure(line, model, name, f"{model}: {says}", note=why, split=rows.split)] if claim else []
    value = float(found.share.mean())
    more: dict[str, Any] = {"difference": value - CHANCE, "rows": several, "error": found.error}
    if claim:
        more |= {"holds": value - CHANCE > ERRORS * found.error, "claim": "above", "values": rounded(found.share)}
    return [whole(line, model, name, says, value, CHANCE, rows, **more)]


def named_figures(
    eye: Eye, drawn: Mapping[str, Tensor], real: Tensor, rows: HeldOut, phrases: Phrases, seed: int, claim: bool
) -> list[Figure]:
    """Returns line (g), where captions have parts, and how often the right real image is found.

    Args:
        eye: The CLIP that looks.
        drawn: By prior, embeddings [n, d] of images that were drawn from captions.
        real: Embeddings [m, d] of real images, of which the first n are of the same rows.
        rows: The n rows.
        phrases: What captions name.
        seed: Of the bootstrap.
        claim: Whether line (g) is claimed, as it is of held-out rows.
    """
    texts, figures = eye.read(rows.captions), []
    end = "" if claim else f"_{rows.split}"
    for model, seen in drawn.items():
        if phrases.named:
            says = f"image nearer to its caption than to one of another name, by {eye.name}, above chance"
            scores = F.normalize(seen, dim=1) @ F.normalize(texts, dim=1).T
            name = f"{eye.name.lower()}_names{end}"
            figures += apart_figures("g", model, name, says, scores, phrases, rows, claim)
        figures += found_first(seen, real, rows, model, eye.name, seed)
    return figures


def found_first(drawn: Tensor, real: Tensor, rows: HeldOut, model: str, eye: str, seed: int) -> list[Figure]:
    """Returns, for information, how often the right real image is among the FIRST of all by cosine to the drawn one.

    ``drawn`` [n, d] are embeddings of images drawn from the captions of ``rows``, and ``real`` [m, d] those of real
    images, of which the first n are of the same rows. Empty where there are no more than FIRST.
    """
    if len(real) <= FIRST:
        return []
    hits = (ranks(drawn, real, torch.arange(len(drawn))) <= FIRST).double()
    chance = torch.full_like(hits, FIRST / len(real))
    says = f"right real image among the first {FIRST} of {len(real)} {rows.split} rows, by {eye}; baseline: chance"
    figure = paired("g", model, f"{eye.lower()}_found_{rows.split}", says, hits, chance, rows, seed, None)
    return [replace(figure, values=None)]  # of more rows it is another figure
