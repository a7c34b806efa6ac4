"""A convolutional network on a large image in overlapping tiles, without seams."""

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 4  # neighbouring tiles share a quarter of their side


def tile_starts(size: int, tile: int, multiple: int) -> list[int]:
    """Returns where overlapping tiles of ``tile`` pixels begin that cover ``size``, at multiples of ``multiple``."""
    step = max(multiple, (tile - tile // OVERLAP) // multiple * multiple)
    return [*range(0, size - tile, step), size - tile]


def tile_weight(tile: int, device: torch.device) -> Tensor:
    """Returns the weight of each pixel of a tile, fp32 [tile, tile], rising from the edges over the overlap to 1."""
    ramp = (torch.arange(tile, device=device) + 0.5) / max(1, tile // OVERLAP)
    side = torch.minimum(ramp, ramp.flip(0)).clamp(max=1)
    return side[:, None] * side


def in_tiles(
    network: Callable[[Tensor, Tensor], Tensor], x: Tensor, condition: Tensor, tile: int, multiple: int
) -> Tensor:
    """Returns ``network`` of x and ``condition``, both [b, c, h, w], from tiles of ``tile`` pixels: fp32 [b, c', h, w].

    Where tiles overlap, their outputs are averaged with weights that fall to nothing at a tile's edge. ``tile``, h and
    w are multiples of ``multiple``, and tiles begin at such.
    """
    height, width = x.shape[2:]
    weight = tile_weight(tile, x.device)
    total, weights = None, x.new_zeros(height, width, dtype=torch.float32)
    for top in tile_starts(height, tile, multiple):
        for left in tile_starts(width, tile, multiple):
            place = (..., slice(top, top + tile), slice(left, left + tile))
            part = network(x[place], condition[place]).float() * weight
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width)
            total[place] += part
            weights[place] += weight
    assert total is not None
    return total / weights
