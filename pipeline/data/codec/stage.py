"""The codec of the AR prior: PCA, then quantile buckets, of the image embeddings of training rows.

scikit-learn fits it to all training rows or to a seeded sample of them, which Ray Data's workers read from the shards.
Rows of other splits are never in the sample.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.stages import Context
from pipeline.progress import counted

VERSION = 3
REASONS_SAID = 2  # of the rows that curation rejected


@dataclass(frozen=True)
class CodecRecipe:
    """Says how finely the codec describes an image embedding.

    Attributes:
        components: Components of the PCA; more than the data's rank is lowered with a warning. ``nano`` keeps 32 and
            ``tiny`` 18, because the AR prior's time grows with them.
        variance_target: Share of the variance: as many components as hold it, in place of ``components``.
        buckets: Quantile buckets a component; equal to ``ar_prior.model.buckets``.
        sample_rows: Training rows that it is fitted to, at most: they lie in one worker's memory, 12 bytes for each
            number of an embedding (9 GB for a million of 768).
        seed: Seed of the sample.
    """

    components: PositiveInt = 319
    variance_target: Annotated[float, Field(gt=0, le=1)] | None = None
    buckets: Annotated[int, Field(ge=2)] = 1024
    sample_rows: Annotated[int, Field(ge=2)] = 1_000_000
    seed: NonNegativeInt = 0


def run_codec(ctx: Context) -> Artifact:
    """Fits the codec and records what it loses.

    Raises:
        UserError: when curation left fewer than two different training rows.
    """
    from pipeline.data.codec import fit

    began = time.monotonic()
    training, sample = fit.sample_training_rows(ctx)
    if training < 2:
        raise UserError(f"codec: {training} training rows are left after curation{_why(ctx)}; see the report")
    ledger, blobs, metrics = fit.fit_sample(ctx, sample)
    artifact = ctx.publishable(blobs=blobs, ledger=ledger, metrics={"training_rows": training, **metrics})
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)


def _why(ctx: Context) -> str:
    """Returns why curation rejected most of its rows, "" where it rejected none."""
    lost = Counter(ctx.inputs["curation"].ledger.lost).most_common(REASONS_SAID)
    said = " and ".join(f"{counted(rows, 'row')} for {reason}" for reason, rows in lost)
    return f", which rejected {said}" if said else ""
