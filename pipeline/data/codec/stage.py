"""The codec of the AR prior: PCA, then quantile buckets, of the image embeddings of training rows.

scikit-learn fits it to all training rows or to a seeded sample of them, which Ray Data's workers read from the shards.
Rows of other splits are never in the sample.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.stages import Context

VERSION = 3


@dataclass(frozen=True)
class CodecRecipe:
    """``components`` kept by PCA, or as many as hold ``variance_target`` of the variance; ``buckets`` a component.

    ``sample_rows``: training rows that it is fitted to, at most; a larger set is sampled, by ``seed``.
    """

    components: int = 319
    variance_target: float | None = None
    buckets: int = 1024
    sample_rows: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.components < 1 or self.buckets < 2 or self.sample_rows < 2:
            raise ValueError("components must be at least 1, buckets and sample_rows at least 2")
        if self.variance_target is not None and not 0 < self.variance_target <= 1:
            raise ValueError(f"variance_target: {self.variance_target} is not a share in (0, 1]")


def run_codec(ctx: Context) -> Artifact:
    """Fits the codec and records what it loses.

    Raises:
        UserError: when curation left fewer than two different training rows.
    """
    from pipeline.data.codec import fit

    began = time.monotonic()
    training, sample = fit.sample_training_rows(ctx)
    if training < 2:
        raise UserError(f"codec: {training} training rows are left after curation; see the rejects in the report")
    ledger, blobs, metrics = fit.fit_sample(ctx, sample)
    artifact = ctx.publishable(blobs=blobs, ledger=ledger, metrics={"training_rows": training, **metrics})
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)
