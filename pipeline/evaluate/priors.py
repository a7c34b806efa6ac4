"""Are priors better than linear regression? Their samples against three baselines without trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cascade import UnCLIP
from models.random_streams import derive_seed
from models.sampling_config import PRIORS
from pipeline.evaluate.condition import CAPTION
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.metric import Metric
from pipeline.evaluate.rows import SplitRows, Tick
from pipeline.evaluate.statistics import cosine, ranks
from pipeline.evaluate.subject import Subject
from pipeline.training.task import Batch
from pipeline.training.tasks.starts import ridge

FIRST = 10  # k of recall at k; of fewer than 100 rows a tenth of them
SEQUENCES = 256  # embeddings sampled at once
Baselines = dict[str, tuple[str, Tensor]]


def first_places(rows: int) -> int:
    """Returns the k of recall at k for this number of rows."""
    return min(FIRST, max(1, rows // FIRST))


def sample_embeddings(unclip: UnCLIP, prior: str, rows: SplitRows, count: int, seed: int, tick: Tick) -> Tensor:
    """Returns ``count`` image embeddings a row, [count, n, d] of unit norm, each from a seed of its own.

    They are sampled with the bundle's options, but without choosing the best candidate. ``prior`` is "ar" or
    "diffusion".
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


def baselines(text: Tensor, training: Batch) -> Baselines:
    """Returns predictions of the image embeddings of captions without a trained model.

    Args:
        text: Embeddings of the captions, [n, d].
        training: "text_embedding" and "image_embedding" of training rows, [m, d] each.

    Returns:
        Title and embeddings [n, d] of each baseline, by name.
    """
    names = ("text_embedding", "image_embedding")
    text, texts, images = (F.normalize(x.double().cpu(), dim=1) for x in (text, *(training[name] for name in names)))
    line = ridge(texts, images)
    return {
        "text": ("caption embedding", text),
        "shift": ("mean-gap shift", text + images.mean(0) - texts.mean(0)),
        "ridge": ("ridge regression", line.image_mean + (text - line.mean) @ line.weight.T),
    }


def measure_cosine(subject: Subject, samples: Tensor, rows: SplitRows, known: Baselines) -> list[Figure]:
    """Returns whether the mean of ``samples`` [k, n, d] is nearer to the right image, by its cosine, than baselines."""
    return [figure for figure, _ in _compare_with(subject, samples, rows, known, cosine)]


def measure_found(subject: Subject, samples: Tensor, rows: SplitRows, known: Baselines) -> list[Figure]:
    """Returns how often the mean of samples retrieves the right image embedding among all ``rows``."""
    first, figures = first_places(len(rows)), []

    def found(query: Tensor, image: Tensor) -> Tensor:
        return (ranks(query, image) <= first).double()

    for figure, baseline in _compare_with(subject, samples, rows, known, found):
        # A baseline that misses so few rows that even a perfect prior would not be significantly better.
        if not subject.compare(rows, torch.ones_like(baseline), baseline).holds:
            missed = f"{float((1 - baseline).sum()):.0f} of {len(rows):,}"
            named = known[figure.name.rpartition("_")[2]][0]
            figure = replace(figure, holds=None, note=f"the {named} baseline misses {missed}, too few to improve on")
        figures.append(figure)
    return figures


def _compare_with(
    subject: Subject, samples: Tensor, rows: SplitRows, known: Baselines, measure: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[tuple[Figure, Tensor]]:
    """Yields a figure for each baseline, with the baseline's values; the first figure keeps those of the samples."""
    image = rows.batch["image_embedding"].double().cpu()
    value = measure(F.normalize(samples.double().mean(0).cpu(), dim=1), image)
    for name, (says, query) in known.items():
        baseline = measure(query, image)
        named = f"{subject.metric.name}_{name}"
        yield subject.compare(rows, value, baseline, named, says, keep=name == "text"), baseline


FOUND, COSINE = (
    Metric(
        name,
        f"{{model}} {claim} linear baselines",
        tuple(PRIORS.values()),
        ("samples", "rows", "baselines"),
        measure,
    )
    for name, claim, measure in (
        ("found", "retrieves the right image more often than", measure_found),
        ("cosine", "gets closer to the right image's embedding than", measure_cosine),
    )
)
