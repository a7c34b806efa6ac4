"""How far two CLIPs, or two codecs, are apart on the same rows: what comes along when a pin is moved. Pure functions.

Two CLIPs have spaces of their own, so a cosine between an embedding of one and an embedding of the other says nothing.
What can be compared is what each says of the rows among themselves: which pictures are alike, and which caption is
whose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.codec import Codec
from pipeline.evaluate.retrieval import TIE, ranks

NEIGHBOURS = 10
Both = tuple[float, float]  # before and after


class Embedded(NamedTuple):
    """Embeddings by one CLIP of n rows, n at least 2: ``image`` and ``text`` [n, d]."""

    image: Tensor
    text: Tensor


class ClipDrift(NamedTuple):
    """Of two CLIPs. ``kept``: how many of the ``neighbours`` nearest pictures of a picture are the same, on the mean,
    and ``chance`` what it were if one CLIP knew nothing of the other. ``rank``: the median place of a caption's own
    picture among all, 1 is the nearest; ``similarity``: the mean cosine of the two."""

    neighbours: int
    kept: float
    chance: float
    rank: Both
    similarity: Both


def clip_drift(before: Embedded, after: Embedded) -> ClipDrift:
    """The drift between two CLIPs, whose dimensions may differ, on the same rows in the same order."""
    rows = len(before.image)
    count = min(NEIGHBOURS, rows - 1)
    kept = count * float(neighbours_kept(before.image, after.image, count).mean())
    return ClipDrift(
        count,
        kept,
        count * count / (rows - 1),
        (_median_rank(before), _median_rank(after)),
        (_similarity(before), _similarity(after)),
    )


def neighbours_kept(before: Tensor, after: Tensor, count: int) -> Tensor:
    """For each row the share of its ``count`` nearest other rows by cosine that are the same in both: fp64 [n].

    Rows [n, d] and [n, e], n above ``count``. Of rows that are equally near, the first ones count.
    """
    return (_nearest(before, count) & _nearest(after, count)).sum(1).double() / count


def _nearest(z: Tensor, count: int) -> Tensor:
    """Whether row j is among the nearest of row i: bool [n, n]."""
    unit = F.normalize(z.double(), dim=1)
    cosines = (unit @ unit.T / TIE).round()  # equal rows differ by rounding
    order = cosines.fill_diagonal_(-torch.inf).sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, order[:, :count], True)


def _median_rank(of: Embedded) -> float:
    return float(ranks(of.text, of.image, torch.arange(len(of.text))).median())


def _similarity(of: Embedded) -> float:
    return float(F.cosine_similarity(of.text.double(), of.image.double(), dim=1).mean())


class CodecDrift(NamedTuple):
    """Of two codecs of one CLIP. ``codes``: how many each makes of a row. ``explained``: the share of the rows'
    variance that its components hold, below 0 where a constant would hold more. ``error``: the mean absolute error of
    a component of an embedding that was encoded and decoded. ``changed``: the share of codes that differ, of those
    that both have, and ``moved`` by how many buckets on the mean; None where they have other numbers of buckets."""

    codes: tuple[int, int]
    explained: Both
    error: Both
    changed: float | None
    moved: float | None


def codec_drift(before: Codec, after: Codec, z: Tensor) -> CodecDrift:
    """The drift between two codecs on embeddings ``z`` [n, d]. Raises ValueError if they are all equal."""
    codes = before.encode(z), after.encode(z)
    changed = moved = None
    if before.buckets == after.buckets:
        shared = min(before.codes, after.codes)
        apart = (codes[0][:, :shared] - codes[1][:, :shared]).abs()
        changed, moved = float((apart > 0).double().mean()), float(apart.double().mean())
    return CodecDrift(
        (before.codes, after.codes),
        (explained(before, z), explained(after, z)),
        (_error(before, codes[0], z), _error(after, codes[1], z)),
        changed,
        moved,
    )


def explained(codec: Codec, z: Tensor) -> float:
    """The share of the variance of rows [n, d] that a codec's components hold, before they become codes.

    Raises ValueError if all rows are equal.
    """
    rows = z.double()
    variance = (rows - rows.mean(0)).square().sum()
    if not variance > 0:
        raise ValueError(f"all {len(z)} embeddings are equal: they have no variance")
    lost = rows - codec.mean - codec.project(z) @ codec.components
    return 1 - float(lost.square().sum() / variance)


def _error(codec: Codec, codes: Tensor, z: Tensor) -> float:
    return float((codec.decode(codes).double() - z.double()).abs().mean())
