"""Scores of images: linear heads on CLIP image embeddings, such as those for aesthetics, NSFW content or watermarks.

A head is a safetensors file with "weight" [1, d] and "bias" [1]. Its content is part of a key, its path is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from pipeline.data.content import read_content
from pipeline.errors import UserError
from pipeline.parse import ContentFile
from pipeline.store import Store

HEAD_BYTES = 16 << 20  # of one head, at most: its weight has a few thousand numbers


def score_column(name: str) -> str:
    """Returns the column of an embeddings shard that holds the scores of head ``name``."""
    return f"score_{name}"


@dataclass(frozen=True)
class Head:
    """A linear head: ``weight`` fp32 [d] and ``bias`` fp32."""

    weight: np.ndarray
    bias: np.float32

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """Scores fp32 [n] of unit-norm embeddings fp32 [n, d]; a row's does not depend on its neighbours."""
        return (embeddings * self.weight).sum(1) + self.bias


def load_heads(store: Store, heads: Mapping[str, ContentFile], embed_dim: int) -> dict[str, Head]:
    """Returns the heads in files, by name, for embeddings of ``embed_dim`` dimensions.

    Raises UserError for a file that cannot be read, that has changed since the configuration was read, or that does
    not hold a head for these embeddings.
    """
    result = {}
    for name, file in heads.items():
        path = file.path or file
        data = read_content(store, file, f"embeddings.heads.{name}", HEAD_BYTES)
        try:
            tensors = load(data)
        except (SafetensorError, KeyError) as e:  # KeyError: of a type that numpy does not know, as bfloat16
            raise UserError(
                f"embeddings.heads.{name}: {path} is not a safetensors file of fp32 or fp16 ({e})"
            ) from None
        shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
        if shapes != {"weight": [1, embed_dim], "bias": [1]}:
            raise UserError(
                f"embeddings.heads.{name}: {path} has {shapes or 'no tensors'}; a head of this CLIP has weight "
                f"[1, {embed_dim}] and bias [1]"
            )
        weight, bias = (tensors[key].astype(np.float32) for key in ("weight", "bias"))
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise UserError(f"embeddings.heads.{name}: {path} holds NaN or Inf; fetch it again")
        result[name] = Head(weight[0], bias[0])
    return result
