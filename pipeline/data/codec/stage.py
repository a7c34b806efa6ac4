"""The codec of the AR prior: PCA, then quantile buckets, of the image embeddings of training rows.

scikit-learn fits it to all training rows or to a seeded sample of them, which Ray Data's workers read from the shards.
Rows of other splits are never in the sample.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from pipeline.data.codec.recipe import CodecRecipe
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.stages import Context, Stage
from pipeline.progress import counted
from pipeline.settings import ShardSettings

REASONS_SAID = 2  # of the rows that curation rejected


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


def _fits(stage: Stage, config: Any) -> None:
    codes = config.ar_prior.model.buckets
    if "ar_prior" in config.bundle.models and codes != stage.recipe.buckets:
        raise UserError(f"codec.buckets: {stage.recipe.buckets} is not ar_prior.model.buckets {codes}")


CODEC = Stage(
    "codec",
    version=3,
    recipe=CodecRecipe,
    inputs=("embeddings", "curation"),
    run=run_codec,
    settings=ShardSettings,
    fits=_fits,
    pinned=True,
    row_seconds=lambda *_: 2e-4,
)
