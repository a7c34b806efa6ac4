"""Measures the priors: lines (a), (b) and (c)."""

from __future__ import annotations

from dataclasses import replace
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ar_prior import ARPrior, log_likelihood
from models.cascade import UnCLIP
from models.codec import Codec
from models.diffusion_prior import best_of, diffusion_prior_loss
from models.draw import derive_seed
from models.sampling_config import PRIORS
from pipeline.evaluate import metrics
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.gap import BATCH, Rise, gap_figure, rise
from pipeline.evaluate.names import apart_figures
from pipeline.evaluate.paired import paired, whole
from pipeline.evaluate.rows import HeldOut, Tick
from pipeline.evaluate.whitening import Whitening
from pipeline.training.task import Batch

CAPTION = ("tokens", "text_embedding")
FIRST = 16  # positions: those of the largest variance
DRAWS = 4  # timesteps a row
SEQUENCES = 256  # sampled at once


def diffusion_prior_gap(unclip: UnCLIP, rows: HeldOut, seed: int) -> Figure:
    """Returns line (a) of the diffusion prior."""
    model = unclip.diffusion_prior
    assert model is not None
    found = rise(lambda b, d: diffusion_prior_loss(model, b, d).total, rows.batch, CAPTION, rows.other, seed, DRAWS)
    return gap_figure("diffusion_prior", "caption", rows, found)


def ar_prior_figures(model: ARPrior, codec: Codec, rows: HeldOut, training: Tensor, seed: int) -> list[Figure]:
    """Returns lines (a) and (b) of the AR prior; ``training`` are embeddings of training rows, fp32 [m, d].

    The dot-product token stays that of the row itself also beside another row's caption: the caption alone is what
    changes. Codes are given those before them, the caption and that token. The baseline is the cheaper of the
    frequencies of codes among training rows and the uniform distribution, which a codec's quantiles come close to.
    """
    image, text = rows.batch["image_embedding"], rows.batch["text_embedding"]
    codes = codec.encode(image)
    coded = rows.batch | {"codes": codes, "dot": codec.encode_dot((image.double() * text.double()).sum(-1))}

    swapped = coded | {name: coded[name][rows.other] for name in CAPTION}
    own, other = nats_per_code(model, coded), nats_per_code(model, swapped)
    frequencies = metrics.marginal_nats(codes, metrics.bucket_counts(codec.encode(training), codec.buckets)).cpu()
    first = slice(None), slice(FIRST)
    return [
        gap_figure("ar_prior", "caption", rows, Rise(own.mean(1), other.mean(1))),
        _entropy(rows, own, frequencies, codec.buckets, "nats_per_code", "every code", seed),
        _entropy(
            rows, own[first], frequencies[first], codec.buckets, "nats_per_first_code", f"the first {FIRST} codes", seed
        ),
    ]


def nats_per_code(model: ARPrior, batch: Batch) -> Tensor:
    """Returns -log probability of every code, fp64 [n, k].

    It is that of "codes" int64 [n, k], given the codes before it, "dot" and CAPTION.
    """
    parts = []
    for start in range(0, len(batch["dot"]), BATCH):
        part = {name: column[start : start + BATCH] for name, column in batch.items()}
        keep = torch.ones_like(part["dot"], dtype=torch.bool)
        arguments = (part["tokens"], part["text_embedding"], part["dot"], part["codes"], keep)
        parts.append(-log_likelihood(model, *arguments).double().cpu())
    return torch.cat(parts)


def _entropy(
    rows: HeldOut, nats: Tensor, frequencies: Tensor, buckets: int, name: str, where: str, seed: int
) -> Figure:
    baseline = frequencies.mean(1)
    if float(baseline.mean()) > log(buckets):
        baseline = torch.full_like(baseline, log(buckets))
    says = f"nats for {where}, below those of the codes' frequencies"
    return paired("b", "ar_prior", name, says, nats.mean(1), baseline, rows, seed, "below")


def sample_embeddings(unclip: UnCLIP, prior: str, rows: HeldOut, count: int, seed: int, tick: Tick) -> Tensor:
    """Returns ``count`` image embeddings a row, [count, n, d] of unit norm, each from a seed of its own.

    As the bundle samples, but without keeping the best. ``prior`` is "ar" or "diffusion".
    """
    sampling = replace(unclip.sampling_with({"prior": prior}), candidates=1)
    tokens, text = (rows.batch[name].repeat(count, 1) for name in CAPTION)
    seeds = [derive_seed(seed, prior, i, row) for i in range(count) for row in range(len(rows))]
    parts = []
    for start in range(0, len(seeds), SEQUENCES):
        part = slice(start, start + SEQUENCES)
        parts.append(unclip.draw_embedding(tokens[part], text[part], seeds[part], sampling))
        tick(f"{PRIORS[prior]} {min(start + SEQUENCES, len(seeds)):,} of {len(seeds):,} samples")
    return torch.cat(parts).unflatten(0, (count, len(rows)))


def sample_figures(model: str, samples: Tensor, rows: HeldOut, whitening: Whitening, seed: int) -> list[Figure]:
    """Returns line (c) of samples [k, n, d] for n rows: direction, spread and distribution, and two plain cosines.

    The first three a second time in coordinates in which style and background have no say, and then how often the mean
    is nearer to its own image than to others of equal style and background, where captions name these.
    """
    samples = samples.cpu()
    image, text = (rows.batch[name].cpu() for name in ("image_embedding", "text_embedding"))
    mean = samples.double().mean(0)
    figures = _three(model, "", "", samples, mean, image, text, rows, seed)
    one, best = metrics.cosine(samples[0], image), metrics.cosine(best_of(samples[:2], text), image)
    texts = metrics.cosine(text, image)
    figures += [
        paired("c", model, "cosine_of_one", "cosine of one sample to the image", one, texts, rows, seed, None),
        paired("c", model, "cosine_of_best", "cosine of the better of two samples", best, texts, rows, seed, None),
    ]
    captions, phrases = rows.captions, whitening.phrases
    s, m, i = (whitening.image(x, captions) for x in (samples, mean, image))
    within = " within style and background" if phrases.named else ""
    where = f", in {whitening.root.shape[1]} whitened directions{within}"
    whitened = _three(model, "_whitened", where, s, m, i, whitening.text(text, captions), rows, seed)
    # Other training rows whiten otherwise, so that rows of two bundles cannot be compared.
    figures += [replace(figure, values=None) for figure in whitened]
    if phrases.named:
        says = f"mean of {len(samples)} samples nearer to its image than to another of equal style and background"
        scores = F.normalize(mean, dim=1) @ F.normalize(image.double(), dim=1).T
        figures += apart_figures("c", model, "own_image", f"{says}, above chance", scores, phrases, rows)
    return figures


def _three(
    model: str, end: str, where: str, samples: Tensor, mean: Tensor, image: Tensor, text: Tensor, rows: HeldOut,
    seed: int,
) -> list[Figure]:  # fmt: skip
    """Returns the three claims of ``samples`` [k, n, d], their ``mean``, ``image`` and ``text`` [n, d].

    Their names end on ``end``, and ``where`` says in which coordinates they are.
    """
    means, texts = metrics.cosine(mean, image), metrics.cosine(text, image)
    says = f"cosine of the mean of {len(samples)} samples to the image, above the caption embedding's{where}"
    return [
        paired("c", model, f"cosine_of_mean{end}", says, means, texts, rows, seed, "above"),
        _variance(model, end, where, samples, image, rows, seed),
        _mmd(model, end, where, samples[0], text, image, rows),
    ]


def _variance(model: str, end: str, where: str, samples: Tensor, image: Tensor, rows: HeldOut, seed: int) -> Figure:
    ratio, interval = metrics.variance_ratio(samples, image, metrics.numbered(rows.groups), seed)
    says = f"variance of samples over that of images, from 0.5 to 1.5{where}"
    around, holds = (interval.low - 1, interval.high - 1), 0.5 <= ratio <= 1.5
    return whole("c", model, f"variance_ratio{end}", says, ratio, 1.0, rows, interval=around, holds=holds)


def _mmd(model: str, end: str, where: str, sample: Tensor, text: Tensor, image: Tensor, rows: HeldOut) -> Figure:
    bandwidth = metrics.median_distance(image)
    ours, theirs = (metrics.mmd_terms(x, image, bandwidth) for x in (sample, text))
    groups = metrics.numbered(rows.groups)
    difference, error = metrics.u_statistic(ours - theirs, groups)
    says = f"squared MMD of samples to images, below the caption embeddings'{where}"
    value, baseline = (metrics.u_statistic(x, groups)[0] for x in (ours, theirs))
    more = {"difference": difference, "error": error, "holds": difference < -2 * error}
    return whole("c", model, f"mmd{end}", says, value, baseline, rows, **more)
