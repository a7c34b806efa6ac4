"""The codec of the AR prior, fitted to the image embeddings of all training rows: PCA, then quantile buckets.

Exact, with the same bits for any number of workers (``codec_passes``). Rows of other splits are never read into it.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.codec import passes
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, Shard, ShardRow, publish_artifact, read_shards, write_shard_table
from pipeline.graph.shards import ShardTask, run_shards
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.store.records import digest, put_blob, read_blob

VERSION = 2


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


# Fields that differ by preset. The AR prior's time grows with the components, and 32 hold 99.2% of the variance of the
# quick start's embeddings.
CODEC_PRESETS: dict[str, dict[str, Any]] = {"nano": {"components": 32}, "tiny": {"components": 32}}


def run_codec(ctx: Context) -> Artifact:
    """Fit PCA and buckets; record what they lose."""
    import torch

    from models.codec import Codec
    from models.folder import save_codec

    torch.set_num_threads(1)  # as in the workers: the eigenvectors' bits must not depend on where the passes ran
    began = time.monotonic()
    curation, embeddings = (read_shards(ctx.store, ctx.inputs[name]) for name in ("curation", "embeddings"))
    blocks = passes.cut_blocks(curation, embeddings, passes.BLOCK_ROWS)
    rows = sum(block.rows for block in blocks)
    if rows < 2:
        raise UserError(f"codec: {rows} training rows are left after curation; see the rejects in the report")
    pca = fit_components(ctx, blocks, rows)
    fitted = fit_all_buckets(ctx, blocks, rows, pca)
    codec = Codec(
        mean=pca.mean,
        components=pca.components,
        variance=pca.variance,
        edges=fitted["edges"][:-1],
        values=fitted["values"][:-1],
        dot_edges=fitted["edges"][-1],
        dot_counts=fitted["counts"][-1],
    )
    kept = float(codec.variance.sum())
    projection = (pca.total_variance - kept) * (rows - 1) / rows
    metrics = {
        "requested": ctx.recipe.components,
        "components": codec.codes,
        "explained_variance_ratio": (codec.variance / pca.total_variance).tolist(),
        "explained": kept / pca.total_variance,
        "reconstruction_error": projection,
        # The components are orthonormal: what the buckets lose adds to what the projection loses.
        "round_trip_error": projection + float(fitted["error"][:-1].sum()) / rows,
        "warnings": [pca.warning] if pca.warning else [],
    }
    with tempfile.TemporaryDirectory() as folder:
        save_codec(folder, codec)
        blobs = {file.name: put_blob(ctx.store, file, move=True) for file in sorted(Path(folder).iterdir())}
    artifact = ctx.publishable(blobs=blobs, ledger=Ledger(kept=rows), metrics=metrics)
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)


def fit_components(ctx: Context, blocks: list[passes.Block], rows: int) -> Any:
    """The PCA of all rows. Raises UserError when they have no components."""
    from safetensors.torch import load

    from models.codec import Moments, fit_pca

    worker = passes.OneThread(passes.SumMoments(ctx.store))
    sums = None
    for shard in _over_blocks(ctx, blocks, rows, worker, "moments"):
        part = Moments(shard.ledger.kept, **load(read_blob(ctx.store, shard.blobs["moments"])))
        sums = part if sums is None else sums.merge(part)
    assert sums is not None
    try:
        return fit_pca(*sums, ctx.recipe.components, ctx.recipe.variance_target)
    except ValueError as e:
        raise UserError(f"codec: {e}") from e


def fit_all_buckets(ctx: Context, blocks: list[passes.Block], rows: int, pca: Any) -> dict[str, Any]:
    """Edges, values, counts and squared error of each component, and after them of the dot products."""
    import torch
    from safetensors.torch import load, save

    blob = put_blob(ctx.store, save({"mean": pca.mean, "components": pca.components.contiguous()}))
    columns = len(pca.components) + 1
    group = max(1, passes.COLUMN_VALUES // rows)
    worker = passes.OneThread(passes.Project(ctx.store, blob, group))
    projected = _over_blocks(ctx, blocks, rows, worker, "coordinates")
    table, _ = write_shard_table(ctx.store, projected)  # not in each task: blocks times groups of names
    listed = ShardRow(0, table, rows, 0, {"blocks": table}, {})
    groups = range(-(-columns // group))
    tasks = [ShardTask(number, digest([ctx.key, "buckets", number]), {"blocks": listed}) for number in groups]
    cut = passes.OneThread(passes.CutBuckets(ctx.store, ctx.recipe.buckets))
    shards, _ = run_shards(ctx, tasks, cut, "columns", columns, "codec buckets")
    fitted = [load(read_blob(ctx.store, shard.blobs["buckets"])) for shard in shards]
    return {name: torch.cat([part[name] for part in fitted]) for name in fitted[0]}


def _over_blocks(
    ctx: Context, blocks: list[passes.Block], rows: int, worker: passes.OneThread, title: str
) -> list[Shard]:
    """One pass over all rows: what it made of each block, in order."""
    tasks = [block.task(i, digest([ctx.key, title, i])) for i, block in enumerate(blocks)]
    return run_shards(ctx, tasks, worker, "rows", rows, f"codec {title}")[0]
