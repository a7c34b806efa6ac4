"""The arithmetic of changing images through their latents (Ramesh et al. 2022, section 3). Pure functions.

An image has two latents: its CLIP image embedding z_i holds what CLIP recognises, and x_T, the decoder's noise, all
else that the image consists of.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.codec import Codec


@dataclass(frozen=True)
class Inversion:
    """Holds the latents of images: ``embedding`` z_i, unit norm [b, d], and ``noise`` x_T, [b, 3, s, s].

    ``tokens`` are the captions that the decoder was conditioned on, int64 [b, 77], or None for none.
    """

    embedding: Tensor
    noise: Tensor
    tokens: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embedding)

    def repeated(self, count: int) -> "Inversion":
        """Returns the only image ``count`` times. Raises ValueError for none, and for several but not ``count``."""
        if count < 1:
            raise ValueError(f"got {count} seeds or shares: give one or more")
        if len(self) == count:
            return self
        if len(self) != 1:
            raise ValueError(f"got {len(self)} images and {count} seeds: give one image, or a seed for each")
        tokens = None if self.tokens is None else self.tokens.expand(count, -1)
        return Inversion(self.embedding.expand(count, -1), self.noise.expand(count, -1, -1, -1), tokens)


def check_embedding(embedding: Tensor, embed_dim: int) -> None:
    """Raises ValueError unless these are image embeddings as CLIP makes them: [b, ``embed_dim``], of unit norm."""
    if embedding.ndim != 2 or embedding.shape[1] != embed_dim:
        raise ValueError(f"embeddings have shape {tuple(embedding.shape)}, this bundle's CLIP makes [b, {embed_dim}]")
    norm = embedding.norm(dim=1)
    if not norm.isfinite().all():
        raise ValueError("embeddings hold NaN or Inf: draw with another seed or bundle, or leave those rows out")
    if ((norm - 1).abs() > 0.01).any():
        raise ValueError(f"embeddings have norms from {norm.min():.3g} to {norm.max():.3g}: normalise them to 1")


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Interpolates rows spherically, [b, ...]: ``a`` where ``share`` [b] is 0, ``b`` where it is 1 (Shoemake 1985).

    The angle is that between the two as vectors; the length changes with them. Rows that point the same way are
    interpolated in a straight line. Computed in fp64.
    """
    x, y = a.double().flatten(1), b.double().flatten(1)
    angle = (F.normalize(x, dim=1) * F.normalize(y, dim=1)).sum(1).clamp(-1, 1).acos()
    share = share.to(angle)
    straight = angle.sin() < 1e-6  # sin(angle) divides
    divisor = torch.where(straight, 1.0, angle.sin())
    of_x = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / divisor)
    of_y = torch.where(straight, share, (share * angle).sin() / divisor)
    return (of_x[:, None] * x + of_y[:, None] * y).view(a.shape).to(a.dtype)


def text_difference(before: Tensor, after: Tensor) -> Tensor:
    """Returns the direction from one caption to another, unit norm [b, d], of text embeddings [b, d] (section 3.3).

    Raises ValueError where both are the same.
    """
    difference = after - before
    if (difference.norm(dim=-1) < 1e-6).any():
        raise ValueError("both captions have the same embedding, so no direction to follow: change one of them")
    return F.normalize(difference, dim=-1)


def first_components(codec: Codec, embedding: Tensor, count: int) -> Tensor:
    """Returns embeddings [b, d] from their first ``count`` principal components, unit norm fp32 (section 4).

    Raises ValueError unless the codec has ``count`` components.
    """
    if not 0 <= count <= codec.codes:
        raise ValueError(f"cannot keep {count} principal components: this codec has {codec.codes}")
    coordinates = codec.project(embedding)[:, :count]
    return F.normalize(codec.mean + coordinates @ codec.components[:count], dim=-1).float()
