"""The recipe of the codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class CodecRecipe:
    """Says how finely the codec describes an image embedding.

    Attributes:
        components: Components of the PCA, reduced to the data's rank with a warning. ``nano`` keeps 32 and ``tiny`` 18,
            because the AR prior's time grows with them.
        variance_target: Share of the variance to explain, which replaces ``components``.
        buckets: Quantile buckets per component; equal to ``ar_prior.model.buckets``.
        sample_rows: Maximum training rows for the fit, which one worker holds in memory, 12 bytes per component of an
            embedding (9 GB for a million with 768).
        seed: Seed of the sample.
    """

    components: PositiveInt = 319
    variance_target: Annotated[float, Field(gt=0, le=1)] | None = None
    buckets: Annotated[int, Field(ge=2)] = 1024
    sample_rows: Annotated[int, Field(ge=2)] = 1_000_000
    seed: NonNegativeInt = 0
