"""The codec of the AR prior, fitted to the image embeddings of all training rows, in the order of shards.

Two passes: fp64 moments for PCA, then the coordinates for quantile buckets. Rows of other splits are never read into
either.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, publish_artifact, read_shards, read_table
from pipeline.data.embeddings import read_embeddings
from pipeline.errors import UserError
from pipeline.graph import Context
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.records import put_blob

VERSION = 1


@dataclass(frozen=True)
class CodecRecipe:
    """``components`` kept by PCA, or as many as hold ``variance_target`` of the variance; ``buckets`` a component."""

    components: int = 319
    variance_target: float | None = None
    buckets: int = 1024

    def __post_init__(self) -> None:
        if self.components < 1 or self.buckets < 2:
            raise ValueError("components must be at least 1 and buckets at least 2")
        if self.variance_target is not None and not 0 < self.variance_target <= 1:
            raise ValueError(f"variance_target: {self.variance_target} is not a share in (0, 1]")


def training_embeddings(ctx: Context) -> Iterator[tuple[Any, Any]]:
    """Image and text embeddings, fp64 [n, d], of the curated training rows of each shard, in order."""
    import numpy as np
    import torch

    embedded = {s.number: s for s in read_shards(ctx.store, ctx.inputs["embeddings"])}
    for shard in read_shards(ctx.store, ctx.inputs["curation"]):
        if shard.counts["train/0"]:
            index = read_table(ctx.store, shard.blobs["index"], ["key", "split"]).to_pydict()
            wanted = {k for k, split in zip(index["key"], index["split"], strict=True) if split == "train"}
            keys, image, text, _ = read_embeddings(ctx.store, embedded[shard.number].blobs["embeddings"])
            rows = np.array([key in wanted for key in keys])
            yield torch.from_numpy(image[rows].astype(np.float64)), torch.from_numpy(text[rows].astype(np.float64))


def run_codec(ctx: Context) -> Artifact:
    """Fit PCA and buckets; record what they lose."""
    import torch

    from models.codec import fit_codec, fit_pca, moments
    from models.folder import save_codec

    torch.set_num_threads(1)  # one order of summation
    recipe = ctx.recipe
    count = sum(shard.counts["train/0"] for shard in read_shards(ctx.store, ctx.inputs["curation"]))
    if count < 2:
        raise UserError(f"codec: {count} training rows are left after curation; see the rejects in the report")
    with Progress("codec", 2 * count, "rows") as progress:
        sums = None
        for image, _ in training_embeddings(ctx):
            sums = moments(image) if sums is None else sums.merge(moments(image))
            progress.advance(len(image))
        assert sums is not None
        try:
            pca = fit_pca(*sums, recipe.components, recipe.variance_target)
        except ValueError as e:
            raise UserError(f"codec: {e}") from e
        coordinates, dots = [], []
        for image, text in training_embeddings(ctx):
            coordinates.append((image - pca.mean) @ pca.components.T)
            dots.append((image * text).sum(1))
            progress.advance(len(image))
        codec = fit_codec(pca, torch.cat(coordinates), torch.cat(dots), recipe.buckets)
    lost = {"projection": 0.0, "round_trip": 0.0}
    for image, _ in training_embeddings(ctx):
        for name, error in codec.errors(image).items():
            lost[name] += float(error.sum()) / count
    metrics = {
        "requested": recipe.components,
        "components": codec.codes,
        "explained_variance_ratio": (codec.variance / pca.total_variance).tolist(),
        "explained": float(codec.variance.sum()) / pca.total_variance,
        "reconstruction_error": lost["projection"],
        "round_trip_error": lost["round_trip"],
        "warnings": [pca.warning] if pca.warning else [],
    }
    with tempfile.TemporaryDirectory() as folder:
        save_codec(folder, codec)
        blobs = {file.name: put_blob(ctx.store, file) for file in sorted(Path(folder).iterdir())}
    artifact = ctx.publishable(blobs=blobs, ledger=Ledger(kept=count), metrics=metrics)
    return publish_artifact(ctx.store, artifact, progress.seconds)
