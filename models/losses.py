"""What every loss of every model returns."""

from typing import NamedTuple

from torch import Tensor


class Losses(NamedTuple):
    """One loss for each row, fp32: ``total`` [b] is what is minimised, ``parts`` [b] each are what it is made of."""

    total: Tensor
    parts: dict[str, Tensor]
