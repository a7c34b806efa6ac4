from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load

from models.codec import Codec, fit_codec, fit_pca, moments
from pipeline.data.codec import passes as codec_passes
from pipeline.data.codec.passes import cut_blocks
from pipeline.data.codec.stage import run_codec
from pipeline.data.embeddings.stage import read_embeddings
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, Shard, ShardRow, read_shards, read_table, write_shard_table, write_table
from pipeline.ledger import Ledger
from pipeline.settings import RaySettings, ShardSettings
from pipeline.store.records import put_blob, read_blob
from tests.pipeline.data.bench import Bench, picture, save_clip, write_list

ROWS = 60
STAGES = ("source", "captions", "pairs", "clip", "embeddings", "curation")


def _list(folder: Path, splits: list[str]) -> str:
    for i in range(len(splits)):
        (folder / f"{i}.png").write_bytes(picture(i))
    return write_list(
        folder / "list.csv", [(f"file://{folder}/{i}.png", f"picture {i}", s) for i, s in enumerate(splits)]
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("codec")
    splits = ["test" if i % 10 == 3 else "validation" if i % 10 == 7 else "train" for i in range(ROWS)]
    weights = save_clip(folder / "clip")
    recipe = {"components": 12, "buckets": 16}
    path = _list(folder, splits)
    bench = Bench(
        folder / "store", [path], clip={"weights": weights}, codec=recipe, ar_prior={"model": {"buckets": 16}}
    )
    bench.make(*STAGES, "codec")
    return bench


def _codec(bench: Bench, artifact: Artifact) -> dict[str, torch.Tensor]:
    return load(read_blob(bench.store, artifact.blobs["model.safetensors"]))


def test_it_is_the_codec_of_the_training_rows(bench: Bench) -> None:
    train = {row["key"] for row in bench.rows("curation") if row["split"] == "train"}
    images, texts = [], []
    for _, blobs in bench.blobs("embeddings"):
        keys, image, text, _ = read_embeddings(bench.store, blobs["embeddings"])
        for i, key in enumerate(keys):
            if key in train:
                images.append(torch.from_numpy(image[i].astype(np.float64)))
                texts.append(torch.from_numpy(text[i].astype(np.float64)))
    z, t = torch.stack(images), torch.stack(texts)
    pca = fit_pca(*moments(z), 12)
    expected = fit_codec(pca, (z - pca.mean) @ pca.components.T, (z * t).sum(1), 16)
    found = _codec(bench, bench.made["codec"])
    assert found.keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():  # moments are merged shard by shard: another order of fp64 sums
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
    metrics = bench.made["codec"].metrics
    assert bench.made["codec"].ledger.kept == len(train) == 48
    assert metrics["components"] == metrics["requested"] == 12
    assert metrics["explained"] == pytest.approx(float(pca.variance.sum()) / pca.total_variance)
    assert metrics["warnings"] == []
    residual = ((z - pca.mean) - (z - pca.mean) @ pca.components.T @ pca.components).square().sum(1).mean()
    assert metrics["reconstruction_error"] == pytest.approx(float(residual), rel=1e-6)
    codec = Codec(**found)
    error = (z - codec.decode(codec.encode(z))).square().sum(1).mean()
    assert metrics["round_trip_error"] == pytest.approx(float(error), rel=1e-6)
    assert metrics["round_trip_error"] > metrics["reconstruction_error"]


def test_blocks_follow_the_shards() -> None:
    def row(number: int, train: int) -> ShardRow:
        return ShardRow(number, f"key-{number}", 10, 0, {}, {"train/0": train})

    curation = [row(n, train) for n, train in ((0, 4), (2, 0), (3, 5), (4, 1), (7, 9), (9, 2))]
    blocks = cut_blocks(curation, [row(n, 0) for n in range(10)], block_rows=10)
    assert [[c.number for c, _ in block.shards] for block in blocks] == [[0, 3, 4], [7, 9]]
    assert [block.rows for block in blocks] == [10, 11]
    assert all(c.number == e.number for block in blocks for c, e in block.shards)
    assert [len(block.shards) for block in cut_blocks(curation, curation, block_rows=100)] == [5]
    assert cut_blocks([row(0, 0)], [row(0, 0)], block_rows=10) == []


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many blocks and many groups of columns; and blocks and groups change no more than rounding."""
    import ray

    monkeypatch.setattr(codec_passes, "BLOCK_ROWS", 10)
    monkeypatch.setattr(codec_passes, "COLUMN_VALUES", 100)  # two columns of 48 rows
    made = {}
    try:
        for workers in (0, 1, 2, 4):
            settings = ShardSettings(workers)
            config = replace(bench.config, run=replace(bench.config.run, ray=RaySettings(cpus=4)))
            ctx = replace(bench.context("codec"), key=f"{workers}-workers", settings=settings, config=config)
            made[workers] = run_codec(ctx)
    finally:
        ray.shutdown()
    # Three blocks in two passes, seven groups of columns; and one of each when the bench was made.
    assert len(list(bench.store.list("shards/codec/"))) == 4 * (3 + 3 + 7) + 3
    assert all(artifact.blobs == made[0].blobs for artifact in made.values())
    assert all(artifact.metrics == made[0].metrics for artifact in made.values())
    whole, parts = _codec(bench, bench.made["codec"]), _codec(bench, made[0])
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-7, atol=1e-9, msg=name)


def test_held_out_rows_change_no_bit(bench: Bench) -> None:
    held_out = {row["key"] for row in bench.rows("curation") if row["split"] != "train"}
    shards = []
    poisoned = 0
    for shard in read_shards(bench.store, bench.made["embeddings"]):
        table = read_table(bench.store, shard.blobs["embeddings"]).to_pydict()
        for i, key in enumerate(table["key"]):
            if key in held_out:
                table["image_embedding"][i] = [float("nan")] * len(table["image_embedding"][i])
                table["text_embedding"][i] = [1e4] * len(table["text_embedding"][i])
                poisoned += 1
        vectors = {n: pa.array(table[n], pa.list_(pa.float16(), 64)) for n in ("image_embedding", "text_embedding")}
        columns = {"key": table["key"], **vectors, "similarity": pa.array(table["similarity"], pa.float32())}
        blob = put_blob(bench.store, write_table(columns))
        shards.append(Shard(shard.number, f"poisoned-{shard.key}", Ledger(kept=shard.kept), {"embeddings": blob}))
    assert poisoned == 12
    table_blob, _ = write_shard_table(bench.store, shards)
    ctx = bench.context("codec")
    embeddings = replace(ctx.inputs["embeddings"], key="poisoned", shard_table=table_blob)
    made = run_codec(replace(ctx, key="poisoned", inputs={**ctx.inputs, "embeddings": embeddings}))
    assert made.blobs == bench.made["codec"].blobs


def test_more_components_than_rows_is_a_warning(tmp_path: Path) -> None:
    path = _list(tmp_path, ["train"] * 5)
    bench = Bench(tmp_path / "store", [path], clip={"weights": save_clip(tmp_path / "clip")})
    codec = bench.make(*STAGES, "codec")
    assert codec.metrics["requested"] == 32
    assert codec.metrics["components"] == 4
    assert codec.metrics["warnings"] == ["k lowered from 32 to 4, the rank of 5 embeddings"]
    assert len(codec.metrics["explained_variance_ratio"]) == 4
    assert codec.metrics["explained"] == pytest.approx(1)


@pytest.mark.parametrize("splits", [["test"] * 3, ["train", "validation", "test"]])
def test_too_few_training_rows_is_a_mistake_of_the_user(tmp_path: Path, splits: list[str]) -> None:
    path = _list(tmp_path, splits)
    bench = Bench(tmp_path / "store", [path], clip={"weights": save_clip(tmp_path / "clip")})
    bench.make(*STAGES)
    with pytest.raises(UserError, match=f"codec: {splits.count('train')} training rows are left after curation"):
        bench.make("codec")


def test_equal_pictures_are_named(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(1))
    path = write_list(tmp_path / "list.csv", [(f"file://{tmp_path}/{i}.png", "same", "train") for i in range(4)])
    bench = Bench(tmp_path / "store", [path], clip={"weights": save_clip(tmp_path / "clip")})
    bench.make(*STAGES)
    with pytest.raises(UserError, match="all 4 embeddings are equal"):
        bench.make("codec")
