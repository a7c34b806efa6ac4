"""Whether the right one is found among many: images by samples of the priors, and captions by images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluate.figure import Figure
from pipeline.evaluate.metrics import Interval, cosine, numbered, percentiles, resample
from pipeline.evaluate.paired import paired, whole
from pipeline.evaluate.rows import HeldOut, TrainingRows
from pipeline.evaluate.statistics import frechet_distance

AMONG = 100  # captions of which an image's own must be the nearest
RECALLS = (1, 10)
TIE = 1e-9  # cosines of equal rows differ by rounding
BASELINES = {
    "text": "the caption's embedding",
    "nearest": "the image of the nearest training caption",
    "shuffled": "the samples for another caption",
}


def ranks(queries: Tensor, gallery: Tensor, own: Tensor) -> Tensor:
    """Returns the rank of row own[i] of ``gallery`` [m, d] by falling cosine to query i of [n, d]: fp64 [n], 1 to m.

    Rows that are equally near share the mean of their places, so a constant query ranks in the middle and not first.
    """
    x, y = (F.normalize(z.double(), dim=1) for z in (queries, gallery))
    scores = x @ y.T
    mine = scores.gather(1, own[:, None])
    nearer, equal = scores > mine + TIE, (scores - mine).abs() <= TIE
    return nearer.sum(1).double() + (equal.sum(1).double() + 1) / 2


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Returns the lower median of ``values`` [n], each so often as ``weights`` [m, n] say: [m]."""
    order = values.argsort()
    reached = weights[:, order].cumsum(1) >= weights.sum(1, keepdim=True) / 2
    return values[order][reached.int().argmax(1)]


def median_interval(x: Tensor, y: Tensor, groups: Tensor, seed: int) -> Interval:
    """Returns the bootstrap interval over ``groups`` [n] of the median of ``x`` [n] less that of ``y`` [n]."""
    weights = resample(groups, seed)
    return percentiles(weighted_median(x, weights) - weighted_median(y, weights))


def told_apart(images: Tensor, texts: Tensor, own: Tensor, among: int = AMONG) -> Tensor:
    """Returns whether caption own[i] is nearer to image i than all others: bool [n]. Its mean is R-precision.

    ``images`` are embeddings [n, d], ``texts`` those of different captions [c, d], or [n, c, d] where every image
    has captions of its own. Of more than ``among`` captions, a row is compared with the next ones after its own, round
    the end. A caption that is as near as the right one counts as a miss.
    """
    x, y = (F.normalize(z.double(), dim=-1) for z in (images, texts))
    scores = x @ y.T if y.dim() == 2 else torch.einsum("nd,ncd->nc", x, y)
    count = scores.shape[1]
    columns = (own[:, None] + torch.arange(min(among, count))) % count
    chosen = scores.gather(1, columns)
    return (chosen[:, :1] > chosen[:, 1:] + TIE).all(1)


def prior_figures(
    model: str, samples: Tensor, rows: HeldOut, gallery: Tensor, training: TrainingRows, seed: int
) -> list[Figure]:
    """Returns figures, for information, of ``samples`` [k, n, d] of a prior for n rows.

    They say how the right images rank, and give Fréchet distances.

    ``gallery`` [m, d]: image embeddings of held-out rows, of which the first n are those of ``rows``. All against the
    caption's embedding, the image of the training row whose caption is nearest, and the samples for another caption.
    """
    samples = samples.cpu()
    image, text = (rows.batch[name].cpu() for name in ("image_embedding", "text_embedding"))
    mean = F.normalize(samples.mean(0), dim=-1)
    nearest = training.image_embedding[(text @ training.text_embedding.T).argmax(1)]
    baselines = {"text": text, "nearest": nearest, "shuffled": mean[rows.other.cpu()]}
    figures = []
    for name, query in baselines.items():
        figures += _ranked(model, "mean", f"the mean of {len(samples)} samples", mean, name, query, rows, gallery, seed)
    figures += _ranked(model, "one", "one sample", samples[0], "text", text, rows, gallery, seed)
    for name in ("nearest", "shuffled"):  # the caption's embedding is the baseline of line (c) already
        says = f"cosine of the mean of {len(samples)} samples to the image; baseline: {BASELINES[name]}"
        values = cosine(mean, image), cosine(baselines[name], image)
        figures.append(paired("c", model, f"cosine_of_mean_{name}", says, *values, rows, seed, None))
    for name in ("text", "nearest"):  # another caption's samples are as they stand the same set
        says = f"Fréchet distance of samples to images; baseline: {BASELINES[name]}"
        values_of_sets = frechet_distance(samples[0], image), frechet_distance(baselines[name], image)
        figures.append(whole("c", model, f"frechet_{name}", says, *values_of_sets, rows))
    return figures


def _ranked(
    model: str, what: str, said: str, query: Tensor, name: str, baseline: Tensor, rows: HeldOut, gallery: Tensor,
    seed: int,
) -> list[Figure]:  # fmt: skip
    """Returns median rank and recalls of the right image by ``query`` [n, d].

    The same by ``baseline`` [n, d], called ``name``, stands beside them.
    """
    own = torch.arange(len(query))
    ours, theirs = ranks(query, gallery.cpu(), own), ranks(baseline, gallery.cpu(), own)
    end = f"by {said}, among {len(gallery)}; baseline: by {BASELINES[name]}"
    medians = float(ours.median()), float(theirs.median())
    says, interval = f"median rank of the image {end}", median_interval(ours, theirs, numbered(rows.groups), seed)
    figures = [whole("c", model, f"rank_of_{what}_{name}", says, *medians, rows, interval=interval)]
    for k in (k for k in RECALLS if k < len(gallery)):
        says = f"images found in the first {k} {end}" if k > 1 else f"images found first {end}"
        figure = paired("c", model, f"recall_{k}_of_{what}_{name}", says, ours <= k, theirs <= k, rows, seed, None)
        figures.append(figure)
    return figures
