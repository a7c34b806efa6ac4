"""Attention, by whichever of PyTorch's ways is the faster one on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_KEYS = 320
"""Up to so many keys, matrix products are faster than fused attention in bf16 on a CPU (benchmarks/variants.py)."""


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(queries keys^T / sqrt(head)) values, [b, heads, n, head], of keys and values [b, heads, m, head].

    ``mask``, bool, broadcasts to [b, heads, n, m]: False hides a key. ``causal``, without a mask and with n = m, hides
    the keys after each query.
    """
    if queries.dtype != torch.bfloat16 or not queries.is_cpu or keys.shape[2] > FEW_KEYS:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(2, 3)
    if causal:
        mask = scores.new_ones(scores.shape[2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ values
