"""Names of tensors, ours and diffusers'.

A table lists pairs (our module, their modules): our weight and bias are the concatenation of those. So our one
projection to queries, keys and values has three counterparts.
"""

from collections.abc import Iterable
from itertools import islice

import torch

from models.interchange.files import Weights
from models.tensors import MOST_TENSORS

Table = Iterable[tuple[str, tuple[str, ...]]]


def pair(ours: str, *theirs: str) -> tuple[str, tuple[str, ...]]:
    """Returns one row of a table."""
    return ours, theirs


def to_theirs(weights: Weights, table: Table) -> Weights:
    """Takes the tensors of ``table`` out of ``weights``, which are ours, and names them as theirs."""
    out: Weights = {}
    for ours, theirs in table:
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in weights:
                parts = weights.pop(f"{ours}.{kind}").chunk(len(theirs))
                out |= {f"{name}.{kind}": part for name, part in zip(theirs, parts, strict=True)}
    return out


def to_ours(weights: Weights, table: Table) -> Weights:
    """Takes the tensors of ``table`` out of ``weights``, which are theirs, and names them as ours.

    A pair whose parts are not all there is left out; loading the model then says what is missing.
    """
    out: Weights = {}
    # The configuration that the table is from may be a stranger's, and name any number of layers.
    for ours, theirs in islice(table, MOST_TENSORS):
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in theirs]
            if all(name in weights for name in names):
                out[f"{ours}.{kind}"] = torch.cat([weights.pop(name) for name in names])
    return out


def under(prefix: str, weights: Weights) -> Weights:
    """Returns the tensors below ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def put_under(prefix: str, weights: Weights) -> Weights:
    """Returns the same tensors with ``prefix`` before their names."""
    return {prefix + name: tensor for name, tensor in weights.items()}
