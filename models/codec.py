"""The codec of the autoregressive prior: turns image embeddings into codes and back.

unCLIP (Ramesh et al. 2022), section 2.2: PCA, components by falling variance, and each coordinate is put into one of
``buckets`` quantile buckets. ``models.codec_fit`` fits it. All arithmetic is fp64, also under autocast (which leaves
fp64 alone), so that a coordinate falls into the same bucket for any batch, device and precision of training.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from models.random_streams import RandomStreams


def digitize(x: Tensor, edges: Tensor) -> Tensor:
    """Counts the inner ``edges`` [k, buckets - 1] that are at or below ``x`` [n, k], per column: int64 [n, k].

    Values outside all edges clamp to the first or last bucket. Equal to numpy.digitize column by column.
    """
    return torch.searchsorted(edges, x.T.contiguous(), right=True).T


@dataclass(frozen=True)
class Codec:
    """PCA and quantile buckets of image embeddings, and buckets of their dot products with text embeddings.

    All fp64 but the counts, which are int64.

    Attributes:
        mean: Mean embedding, [d].
        components: Principal components, [k, d], orthonormal, by falling variance.
        variance: Variance of each component, [k].
        edges: Edges between the buckets of each component, [k, buckets - 1].
        values: Mean of each bucket, [k, buckets].
        dot_edges: Edges between the buckets of dot products, [buckets - 1].
        dot_counts: Fitted rows in each bucket of dot products, [buckets].
    """

    mean: Tensor
    components: Tensor
    variance: Tensor
    edges: Tensor
    values: Tensor
    dot_edges: Tensor
    dot_counts: Tensor

    @property
    def codes(self) -> int:
        """Returns k, the codes of an embedding."""
        return len(self.components)

    @property
    def buckets(self) -> int:
        """Returns the number of buckets of a code."""
        return self.values.shape[1]

    def to(self, device: torch.device | str) -> "Codec":
        """Returns the codec on another device, which must support fp64."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors to save; ``Codec(**tensors)`` restores the codec."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def project(self, z: Tensor) -> Tensor:
        """Returns the PCA coordinates of embeddings [b, d]: fp64 [b, k]."""
        return (z - self.mean) @ self.components.T

    def encode(self, z: Tensor) -> Tensor:
        """Returns codes of embeddings [b, d]: int64 [b, k] in [0, buckets). Values outside those of training clamp."""
        return digitize(self.project(z), self.edges)

    def decode(self, codes: Tensor) -> Tensor:
        """Returns embeddings fp32 [b, d] of codes int64 [b, k], where a code stands for the mean of its bucket.

        They are not normalised: what PCA cut off is missing in their norm. Normalise before use as CLIP embeddings.
        """
        coordinates = self.values.gather(1, codes.T).T
        return (self.mean + coordinates @ self.components).float()

    def encode_dot(self, s: Tensor) -> Tensor:
        """Returns the dot-product tokens of s = z_i . z_t, [b]: int64 [b] in [0, buckets)."""
        return torch.searchsorted(self.dot_edges, s.double(), right=True)

    def sample_upper_dot(self, rng: RandomStreams) -> Tensor:
        """Draws dot-product tokens from the upper half of their training distribution, int64 [rows] (section 2.2)."""
        # A high dot product asks for an image that fits its caption well.
        cdf = self.dot_counts.cumsum(0).double() / self.dot_counts.sum()
        upper = 0.5 + 0.5 * rng.uniform("dot").double()
        return torch.searchsorted(cdf, upper.to(cdf.device), right=True)
