"""Coordinates of image embeddings in which every direction counts alike, and style and background do not.

A few directions hold nearly all of the variance of embeddings, and much of it is palette, so plain cosines and
variances hardly see what an image shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.evaluate.captions import Frame, Phrases
from pipeline.evaluate.rows import TrainingRows
from pipeline.held_out import FEWEST

SHARE = 0.99  # of the variance, as much as the paper's codec keeps (section 2.2)


@dataclass(frozen=True)
class Whitening:
    """Maps embeddings to whitened coordinates within their style and background.

    From an embedding the mean of training rows of equal style and background is taken, of images or of texts. What is
    left is scaled by the covariance of training images about these means, which is sphering within classes (Fisher
    1936), in its first directions that hold SHARE of the variance. Others are left out: of few rows their variance is
    not known, and divided by it noise would count as much as everything else.

    Attributes:
        phrases: Say which style and background a caption has; without phrases all rows have one.
        images: Means of images [d] by style and background, and None for all.
        texts: The same of texts.
        root: The inverse root of the covariance, [d, k].
    """

    phrases: Phrases
    images: dict[Frame | None, Tensor]
    texts: dict[Frame | None, Tensor]
    root: Tensor

    def image(self, x: Tensor, captions: Sequence[str]) -> Tensor:
        """Returns image embeddings [..., n, d] of n captions in these coordinates: fp64 [..., n, k]."""
        return (x.double() - self._means(self.images, captions)) @ self.root

    def text(self, x: Tensor, captions: Sequence[str]) -> Tensor:
        """Returns text embeddings, as ``image`` does, so that no gap between texts and images is left."""
        return (x.double() - self._means(self.texts, captions)) @ self.root

    def _means(self, means: dict[Frame | None, Tensor], captions: Sequence[str]) -> Tensor:
        return torch.stack([means.get(self.phrases.frame(caption), means[None]) for caption in captions])


def fit_whitening(training: TrainingRows, phrases: Phrases) -> Whitening:
    """Returns the whitening of training rows.

    A style and background of fewer than FEWEST rows, and captions without parts, have the mean of all rows.
    """
    frames = [phrases.frame(caption) for caption in training.captions]
    common = {frame for frame, rows in Counter(frames).items() if frame and rows >= FEWEST}
    chosen = {frame: torch.tensor([found == frame for found in frames]) for frame in common}
    means = []
    for x in (training.image_embedding.double(), training.text_embedding.double()):
        means.append({None: x.mean(0)} | {frame: x[rows].mean(0) for frame, rows in chosen.items()})
    images, texts = means
    used = [frame if frame in common else None for frame in frames]
    left = training.image_embedding.double() - torch.stack([images[frame] for frame in used])
    values, vectors = torch.linalg.eigh(left.T @ left / max(1, len(left) - len(set(used))))
    values, vectors = values.flip(0), vectors.flip(1)
    k = int((values.cumsum(0) < SHARE * values.sum()).sum()) + 1
    return Whitening(phrases, images, texts, vectors[:, :k] / values[:k].sqrt())
