"""How good the drawn images of 64 px are, as a CLIP sees them. All for information: nothing here holds or fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.clip import Clip
from pipeline.errors import UserError
from pipeline.evaluate.captions import Phrases
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.images import embed
from pipeline.evaluate.metrics import cosine
from pipeline.evaluate.paired import paired, whole
from pipeline.evaluate.retrieval import AMONG, told_apart
from pipeline.evaluate.rows import HeldOut
from pipeline.evaluate.statistics import BLOCK, cmmd, frechet_distance
from pipeline.held_out import FEWEST

BATCH = 128  # captions
NEIGHBOURS = 3


@dataclass(frozen=True)
class Eye:
    """A CLIP that looks at images: the bundle's own, called "CLIP", or another, called "judge"."""

    name: str
    clip: Clip

    def look(self, images: Tensor) -> Tensor:
        """Returns embeddings of images uint8 [n, s, s, 3]: fp32 [n, d] on the CPU."""
        return embed(self.clip, images)

    def read(self, captions: Sequence[str]) -> Tensor:
        """Returns the embeddings of captions: fp32 [n, d] on the CPU."""
        tokens = self.clip.tokenize(captions).to(self.clip.mean.device)
        return torch.cat([self.clip.encode_text(part).cpu() for part in tokens.split(BATCH)])


def load_judge(weights: str | None, device: torch.device) -> Clip | None:
    """Returns the CLIP of ``evaluation.judge``, written as ``clip.weights`` is; None for none. Raises UserError.

    A model that was trained on the embeddings of one CLIP may please that CLIP alone.
    """
    if weights is None:
        return None
    try:
        clip = Clip.named(weights)
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"evaluation.judge: {e}") from e
    return clip.to(device)


@dataclass(frozen=True)
class Choice:
    """Holds captions among which an image must find its own.

    Attributes:
        name: Part of the names of figures.
        says: The same in words.
        texts: Embeddings [c, d], or [n, c, d] with captions for every row.
        own: Which of them is row i's own, int64 [n].
        chosen: The rows that take part, int64 [n].
    """

    name: str
    says: str
    texts: Tensor
    own: Tensor
    chosen: Tensor


def choices(eye: Eye, captions: Sequence[str], more: Sequence[str], phrases: Phrases) -> list[Choice]:
    """Returns the choices for rows with these ``captions``; ``more`` captions fill them up to AMONG different ones.

    Whole captions; then, for the rows whose captions have parts by ``phrases``, names alone, and names with the row's
    own style and background. A choice of fewer than two is left out.
    """
    found = []
    distinct = _filled(captions, more)
    if len(distinct) > 1:
        says = f"R-precision among {min(AMONG, len(distinct))} captions"
        own = torch.tensor([distinct.index(caption) for caption in captions])
        found.append(Choice("r_precision", says, eye.read(distinct), own, torch.arange(len(captions))))
    taken = {i: part for i, caption in enumerate(captions) if (part := phrases.parts(caption))}
    names = _filled([part.name for part in taken.values()], [part.name for c in more if (part := phrases.parts(c))])
    if taken and len(names) > 1:
        chosen = torch.tensor(list(taken))
        own = torch.tensor([names.index(part.name) for part in taken.values()])
        says = f"R-precision among {min(AMONG, len(names))} names"
        found.append(Choice("name_alone", f"{says} alone", eye.read(names), own, chosen))
        frames = {(part.style, part.background): part for part in taken.values()}
        texts = {frame: eye.read([part.called(name) for name in names]) for frame, part in frames.items()}
        # Of each row only the names that it is compared with, its own first: all of them would fill the memory.
        compared = (own[:, None] + torch.arange(min(AMONG, len(names)))) % len(names)
        parts = zip(taken.values(), compared, strict=True)
        own_texts = torch.stack([texts[part.style, part.background][columns] for part, columns in parts])
        says += " in the style and on the background"
        found.append(Choice("within_style", says, own_texts, torch.zeros_like(own), chosen))
    return found


def _filled(own: Sequence[str], more: Sequence[str]) -> list[str]:
    """Returns different texts: all of ``own``, filled up from ``more`` to AMONG."""
    distinct = list(dict.fromkeys(own))
    others = [text for text in dict.fromkeys(more) if text not in set(distinct)]
    return distinct + others[: max(0, AMONG - len(distinct))]


def right(choice: Choice, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns whether images [n, d], of the first n rows, find their own caption, and which rows take part.

    bool [m] and int64 [m].
    """
    kept = choice.chosen < len(images)
    texts = choice.texts[kept] if choice.texts.dim() == 3 else choice.texts
    return told_apart(images[choice.chosen[kept]], texts, choice.own[kept]), choice.chosen[kept]


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """Returns 100 times the cosine of each image to its caption, at least 0: fp64 [n] from embeddings [n, d] each.

    Hessel et al. 2021, scaled as torchmetrics does.
    """
    return 100 * cosine(images, texts).clamp(min=0)


def covered(points: Tensor, of: Tensor) -> Tensor:
    """Returns whether each of ``points`` [n, d] lies within some ball around a row of ``of`` [m, d], bool [n].

    A row's ball reaches to the NEIGHBOURS-th nearest of the others (to the farthest, where there are fewer). So
    precision is the share of drawn rows that are covered by real ones, and recall the share of real ones that are
    covered by drawn ones (Kynkäänniemi et al. 2019). Raises ValueError for fewer than two rows.
    """
    if len(of) < 2:
        raise ValueError(f"{len(of)} rows have no neighbours")
    points, of = points.double(), of.double()
    reach = []
    for start in range(0, len(of), BLOCK):
        own = torch.cdist(of[start : start + BLOCK], of)
        own.diagonal(start).fill_(torch.inf)
        reach.append(own.kthvalue(min(NEIGHBOURS, len(of) - 1), dim=1).values)
    reaches = torch.cat(reach)
    return torch.cat([(torch.cdist(part, of) <= reaches).any(1) for part in points.split(BLOCK)])


def distribution_figures(
    model: str, eye: str, subject: str, end: str, drawn: Tensor, other: Tensor, real: Tensor, rows: HeldOut, seed: int
) -> list[Figure]:
    """Returns CMMD, Fréchet distance, precision and recall of ``drawn`` [n, d] against held-out ``real`` [n, d].

    The baseline is what ``other`` [n, d], as many real images of training rows, have in the place of the drawn ones: no
    model need be better. ``eye`` names whose embeddings they are, ``subject`` what was drawn; names end on ``end``.
    """
    short = eye.lower()
    told = f"of {subject} images to real ones, by {eye}; baseline: training images"
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


def named(kind: str) -> tuple[str, str, str]:
    """Returns the model of a set of images, the end of its figures' names, and what sentences call it.

    Sets are named by model, and "early" is the decoder's earlier checkpoint.
    """
    return ("decoder", "_early", "an early checkpoint's") if kind == "early" else (kind, "", "drawn")


def quality_figures(
    eye: Eye, drawn: Mapping[str, Tensor], real: Tensor, training: Tensor, rows: HeldOut, more: Sequence[str],
    phrases: Phrases, seed: int,
) -> list[Figure]:  # fmt: skip
    """Returns the figures of every set of ``drawn`` embeddings [m, d], m at least 2, each of the first m of ``rows``.

    Sets are named as ``named`` reads them. ``real`` [n, d] are the rows' own images and ``training`` [n, d] those of
    training rows. ``more``: captions to choose among besides those of the rows. A choice of which fewer than FEWEST
    rows have a part gives no figure.
    """
    texts, offered = eye.read(rows.captions), choices(eye, rows.captions, more, phrases)
    short, figures = eye.name.lower(), []
    for kind, seen in drawn.items():
        model, end, subject = named(kind)
        m = len(seen)
        part = rows.first(m)
        score = f"CLIP score of {subject} images, by {eye.name}; baseline: real images"
        values = clip_score(seen, texts[:m]), clip_score(real[:m], texts[:m])
        figures.append(paired("f", model, f"{short}_score{end}", score, *values, part, seed, None))
        for choice in offered:
            (ours, chosen), (theirs, _) = right(choice, seen), right(choice, real[:m])
            if len(ours) >= FEWEST:
                says = f"{choice.says}, of {subject} images, by {eye.name}; baseline: real images"
                name = f"{short}_{choice.name}{end}"
                figures.append(paired("f", model, name, says, ours, theirs, part, seed, None, chosen))
        figures += distribution_figures(model, eye.name, subject, end, seen, training[:m], real[:m], part, seed)
    return figures
