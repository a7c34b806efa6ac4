"""Condition gap: the rise of a model's loss with another row's condition, 0 for a model that ignores it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from models.ar_prior import ARPrior, log_likelihood
from models.cascade import UnCLIP
from models.decoder import decoder_loss
from models.diffusion_prior import DiffusionPrior, diffusion_prior_loss
from models.random_streams import RandomStreams, derive_seed
from models.sampling_config import MODELS, PRIORS, UPSAMPLERS
from models.upsampler import Upsampler, training_low, upsampler_loss
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.metric import Metric
from pipeline.evaluate.rows import SplitRows
from pipeline.evaluate.subject import Subject
from pipeline.training.task import Batch

CAPTION = ("tokens", "text_embedding")
DRAWS = 4  # timesteps a row; for an upsampler half as many, with a crop each
BATCH = 32  # rows at once
Loss = Callable[[Batch, RandomStreams], Tensor]


class Losses(NamedTuple):
    """Losses of each row, fp64 [n]: with its own condition, and with another row's."""

    own: Tensor
    other: Tensor


def losses(
    loss: Loss,
    batch: Batch,
    conditions: Sequence[str],
    other: Tensor,
    seed: int,
    draws: int = 1,
    prepare: Callable[[Batch, RandomStreams], Batch] = lambda batch, rng: batch,
) -> Losses:
    """Returns ``loss`` of the rows of ``batch`` with their own ``conditions``, and with those of rows ``other`` [n].

    Noise and timesteps are the same on both sides, and every row has numbers of its own; the mean over
    ``draws`` draws of noise. ``prepare`` adds columns that depend on ``rng``, which may be conditions.
    """
    n = len(other)
    totals = torch.zeros(2, n, dtype=torch.float64)
    parts = [slice(start, min(start + BATCH, n)) for start in range(0, n, BATCH)]
    for number in range(draws):
        numbers = [
            RandomStreams([(derive_seed(seed, "gap", number, i), 1) for i in range(n)[part]], other.device)
            for part in parts
        ]
        own = [
            prepare({name: column[part] for name, column in batch.items()}, rng)
            for part, rng in zip(parts, numbers, strict=True)
        ]
        # Swapped after ``prepare``, so that another row's condition is prepared with that row's own noise.
        swapped = {name: torch.cat([part[name] for part in own])[other] for name in conditions}
        for part, rng, mine in zip(parts, numbers, own, strict=True):
            theirs = mine | {name: column[part] for name, column in swapped.items()}
            totals[0, part] += loss(mine, rng).double().cpu() / draws
            totals[1, part] += loss(theirs, rng).double().cpu() / draws
    return Losses(totals[0], totals[1])


def measure_condition(subject: Subject, rows: SplitRows) -> list[Figure]:
    """Returns whether the loss with another row's condition is above that with the own one."""
    # Values of rows are not kept: two bundles' losses may not be comparable, such as those over codes of two codecs.
    unclip, model, seed = subject.unclip, subject.model, subject.recipe.seed
    if model in UPSAMPLERS:
        condition, found = "small image", upsampler_losses(getattr(unclip, model), rows, seed)
    elif model in PRIORS.values():
        condition, found = "caption", prior_losses(unclip, model, rows, seed)
    else:
        condition, found = "embedding and caption", decoder_losses(unclip, rows, seed)
    says = f"{model}'s {condition}"
    return [subject.compare(rows, found.other, found.own, says=says, keep=False)]


CONDITION = Metric(
    "condition",
    "Every model uses its condition: shuffling conditions raises its loss",
    MODELS,
    ("rows",),
    measure_condition,
    together=True,
)


def prior_losses(unclip: UnCLIP, model: str, rows: SplitRows, seed: int) -> Losses:
    """Returns the losses of a prior, "ar_prior" or "diffusion_prior", by its caption.

    The AR prior's loss is in nats a code.
    """
    batch, draws = rows.batch, DRAWS
    loss: Loss
    if model == "diffusion_prior":
        assert unclip.diffusion_prior is not None
        loss = partial(_diffusion_loss, unclip.diffusion_prior)
    else:
        assert unclip.ar_prior is not None
        assert unclip.codec is not None
        # The dot-product token stays the row's own beside another row's caption: the caption alone changes.
        dot = unclip.codec.encode_dot((batch["image_embedding"].double() * batch["text_embedding"].double()).sum(-1))
        batch = batch | {"codes": unclip.codec.encode(batch["image_embedding"]), "dot": dot}
        loss, draws = partial(_nats, unclip.ar_prior), 1
    return losses(loss, batch, CAPTION, rows.other, seed, draws)


def _diffusion_loss(model: DiffusionPrior, batch: Batch, rng: RandomStreams) -> Tensor:
    return diffusion_prior_loss(model, batch, rng).total


def _nats(model: ARPrior, batch: Batch, rng: RandomStreams) -> Tensor:
    keep = torch.ones_like(batch["dot"], dtype=torch.bool)
    arguments = (batch["tokens"], batch["text_embedding"], batch["dot"], batch["codes"], keep)
    return -log_likelihood(model, *arguments).double().mean(1)


def decoder_losses(unclip: UnCLIP, rows: SplitRows, seed: int) -> Losses:
    """Returns the losses of the decoder by its condition, embedding and caption together."""

    def loss(batch: Batch, rng: RandomStreams) -> Tensor:
        return decoder_loss(unclip.decoder, batch, rng).total

    return losses(loss, rows.batch, ("image_embedding", "tokens"), rows.other, seed, DRAWS)


def upsampler_losses(model: Upsampler, rows: SplitRows, seed: int) -> Losses:
    """Returns the losses of an upsampler by its small image, on crops as in training."""

    def with_low(batch: Batch, rng: RandomStreams) -> Batch:
        return batch | {"low": training_low(model.config, batch, rng)}

    def loss(batch: Batch, rng: RandomStreams) -> Tensor:
        return upsampler_loss(model, batch, rng).total

    images = {"image": rows.batch["image"]}
    return losses(loss, images, ("low",), rows.other, seed, DRAWS // 2, prepare=with_low)
