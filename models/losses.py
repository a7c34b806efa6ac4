"""The result of every model's loss."""

from typing import NamedTuple

from torch import Tensor


class Losses(NamedTuple):
    """Holds one loss for each row, fp32: the ``total`` [b], which is minimised, and its ``parts`` by name, [b] each."""

    total: Tensor
    parts: dict[str, Tensor]
