"""Do priors know more than a line? Their samples against three baselines that have no trained weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cascade import UnCLIP
from models.draw import derive_seed
from models.sampling_config import PRIORS
from pipeline.evaluate.condition import CAPTION
from pipeline.evaluate.figure import NAMES, Figure
from pipeline.evaluate.metrics import cosine, paired, ranks
from pipeline.evaluate.rows import SplitRows, Tick
from pipeline.training.task import Batch
from pipeline.training.tasks.starts import ridge

FIRST = 10  # places among which the right image is looked for; of fewer than 100 rows a tenth of them
SEQUENCES = 256  # sampled at once


def first_places(rows: int) -> int:
    """Returns how many places count as found, of this number of rows."""
    return min(FIRST, max(1, rows // FIRST))


def sample_embeddings(unclip: UnCLIP, prior: str, rows: SplitRows, count: int, seed: int, tick: Tick) -> Tensor:
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


def baselines(text: Tensor, training: Batch) -> dict[str, tuple[str, Tensor]]:
    """Returns what can be said of the image embeddings of captions without a trained model.

    Args:
        text: Embeddings of the captions, [n, d].
        training: "text_embedding" and "image_embedding" of training rows, [m, d] each.

    Returns:
        By name, what the baseline is called, and its embeddings [n, d].
    """
    names = ("text_embedding", "image_embedding")
    text, texts, images = (F.normalize(x.double().cpu(), dim=1) for x in (text, *(training[name] for name in names)))
    line = ridge(texts, images)
    return {
        "text": ("the caption's own embedding", text),
        "shift": ("its shift by the mean gap", text + images.mean(0) - texts.mean(0)),
        "ridge": ("one ridge solve", line.image_mean + (text - line.mean) @ line.weight.T),
    }


def nearer(model: str) -> str:
    """Returns what is claimed of a prior's embeddings."""
    return f"{NAMES[model]} comes nearer to the right image's embedding than baselines without weights"


def prior_figures(model: str, samples: Tensor, rows: SplitRows, training: Batch, seed: int) -> list[Figure]:
    """Returns two lines on ``samples`` [k, n, d] of a prior: is their mean nearer to the right image than baselines?

    How often the right image embedding is among the first of all ``rows``, and the cosine to it. The values, which are
    the same beside each baseline, are kept once. Beside a baseline that finds all but a few, none can do better.
    """
    mean = F.normalize(samples.double().mean(0).cpu(), dim=1)
    image = rows.batch["image_embedding"].double().cpu()
    first, who = first_places(len(rows)), NAMES[model]
    among = f"among the first {first} of {len(rows):,}"
    by_rank = f"{who} finds the right image {among} more often than baselines without weights"
    by_cosine = nearer(model)
    known = baselines(rows.batch["text_embedding"], training)
    figures = []
    for line, short in ((by_rank, "found"), (by_cosine, "cosine")):

        def measure(query: Tensor, short: str = short) -> Tensor:
            return (ranks(query, image) <= first).double() if short == "found" else cosine(query, image)

        for name, (says, query) in known.items():
            compare = partial(
                paired, line, model, f"{short}_{name}", says, groups=rows.groups, split=rows.split, seed=seed
            )
            value, baseline = measure(mean), measure(query)
            figure = compare(value, baseline)
            if short == "found" and not compare(torch.ones_like(baseline), baseline).holds:
                missed = f"{float((1 - baseline).sum()):.0f} of {len(rows):,}"
                figure = replace(figure, holds=None, note=f"it misses {missed}, too few to do better")
            figures.append(figure if name == "text" else replace(figure, values=None, groups=None))
    return figures
