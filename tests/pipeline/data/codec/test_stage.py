from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load as numpy_load
from safetensors.torch import load

from models.codec import Codec
from models.codec_fit import fit_codec
from pipeline.data.codec import fit
from pipeline.data.codec.stage import run_codec
from pipeline.data.embeddings.parts import read_embeddings
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.settings import RaySettings, ShardSettings
from pipeline.store.records import read_blob
from tests.pipeline.data.bench import Bench, picture, save_clip, write_list, write_listed

ROWS = 60
STAGES = ("source", "captions", "pairs", "clip", "embeddings", "curation")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("codec")
    splits = ["test" if i % 10 == 3 else "validation" if i % 10 == 7 else "train" for i in range(ROWS)]
    weights = save_clip(folder / "clip")
    recipe = {"components": 12, "buckets": 16}
    path = write_listed(folder, [picture(i) for i in range(ROWS)], splits)
    bench = Bench(
        folder / "store", [path], clip={"weights": weights}, codec=recipe, ar_prior={"model": {"buckets": 16}}
    )
    bench.make(*STAGES, "codec")
    return bench


def _codec(bench: Bench, artifact: Artifact) -> dict[str, torch.Tensor]:
    return load(read_blob(bench.store, artifact.blobs["model.safetensors"]))


def _training_rows(bench: Bench) -> tuple[torch.Tensor, torch.Tensor]:
    """Image embeddings of the curated training rows, in order, and their dot products with the text."""
    train = {row["key"] for row in bench.rows("curation") if row["split"] == "train"}
    images, texts = [], []
    for _, blobs in bench.blobs("embeddings"):
        keys, image, text, _ = read_embeddings(bench.store, blobs["embeddings"])
        chosen = [key in train for key in keys]
        images.append(torch.from_numpy(image[chosen].astype(np.float64)))
        texts.append(torch.from_numpy(text[chosen].astype(np.float64)))
    return torch.cat(images), (torch.cat(images) * torch.cat(texts)).sum(1)


def _check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-9, msg=name)


def test_it_is_the_codec_of_the_training_rows(bench: Bench) -> None:
    z, dots = _training_rows(bench)
    expected = fit_codec(z, dots, 12, 16)
    found, made = _codec(bench, bench.made["codec"]), bench.made["codec"]
    _check_equal(found, expected.codec.tensors())
    assert made.ledger.kept == made.metrics["rows"] == made.metrics["training_rows"] == len(z) == 48
    assert made.metrics["components"] == made.metrics["requested"] == 12
    assert made.metrics["explained"] == pytest.approx(sum(expected.explained))
    assert made.metrics["warnings"] == []
    codec = Codec(**found)
    error = (z - codec.decode(codec.encode(z))).square().sum(1).mean()
    assert made.metrics["round_trip_error"] == pytest.approx(float(error), rel=1e-6)
    assert made.metrics["round_trip_error"] > made.metrics["reconstruction_error"] > 0


def test_a_sample_has_the_size_that_is_asked_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """From every block its share; another seed draws other rows, and the same seed the same."""
    monkeypatch.setattr(fit, "BLOCK_ROWS", 20)
    z, _ = _training_rows(bench)
    ctx = bench.context("codec")
    drawn = []
    for seed in (0, 1):
        sampled = replace(ctx, recipe=replace(ctx.recipe, sample_rows=31, seed=seed))
        training, shards = fit.sample_training_rows(sampled)
        parts = [numpy_load(read_blob(bench.store, shard.blobs["sample"])) for shard in shards]
        sizes = [len(part["dot"]) for part in parts]
        assert (training, sum(sizes)) == (48, 31)
        assert len(sizes) == 3
        assert max(sizes) - min(sizes) <= 4
        rows = np.concatenate([part["image"] for part in parts])
        assert len({row.tobytes() for row in rows} & {row.tobytes() for row in z.numpy().astype(np.float16)}) == 31
        made = run_codec(replace(sampled, key=f"seed-{seed}"))
        assert (made.metrics["rows"], made.metrics["training_rows"]) == (31, 48)
        drawn.append((rows, made.blobs))
    assert not np.array_equal(drawn[0][0], drawn[1][0])
    assert drawn[0][1] != drawn[1][1]


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many blocks, and of all rows in one block up to rounding."""
    import ray

    monkeypatch.setattr(fit, "BLOCK_ROWS", 10)
    made = {}
    try:
        for workers in (0, 1, 3):
            ctx = replace(bench.context("codec"), settings=ShardSettings(workers), ray=RaySettings(cpus=4))
            ctx = replace(ctx, key=f"{workers}-workers", version=1000 + workers)
            made[workers] = run_codec(ctx)
    finally:
        ray.shutdown()
    assert all(artifact.blobs == made[0].blobs for artifact in made.values())
    assert all(artifact.metrics == made[0].metrics for artifact in made.values())
    _check_equal(_codec(bench, made[0]), _codec(bench, bench.made["codec"]))


def test_more_components_than_rows_is_a_warning(tmp_path: Path) -> None:
    path = write_listed(tmp_path, [picture(i) for i in range(5)])
    bench = Bench(tmp_path / "store", [path], clip={"weights": save_clip(tmp_path / "clip")})
    codec = bench.make(*STAGES, "codec")
    assert codec.metrics["requested"] == 32
    assert codec.metrics["components"] == 4
    assert codec.metrics["warnings"] == ["k lowered from 32 to 4, the rank of 5 embeddings"]
    assert len(codec.metrics["explained_variance_ratio"]) == 4
    assert codec.metrics["explained"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("seeds", "splits", "said"),
    [
        ([0, 1, 2], ["test"] * 3, "codec: 0 training rows are left after curation; see the report"),
        ([0, 1, 2], ["train", "validation", "test"], "codec: 1 training rows are left after curation; see"),
        ([1, 1, 1, 1], [], "all 4 embeddings are equal"),
    ],
)
def test_too_few_different_training_rows_is_a_mistake_of_the_user(
    tmp_path: Path, seeds: list[int], splits: list[str], said: str
) -> None:
    path = write_listed(tmp_path, [picture(seed) for seed in seeds], splits)
    bench = Bench(tmp_path / "store", [path], clip={"weights": save_clip(tmp_path / "clip")})
    bench.make(*STAGES)
    with pytest.raises(UserError, match=said):
        bench.make("codec")


def test_why_no_training_row_is_left(tmp_path: Path) -> None:
    captions = ["long " * 20, "long " * 20, "x"]
    for i in range(len(captions)):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    rows = [(f"file://{tmp_path}/{i}.png", caption, "train") for i, caption in enumerate(captions)]
    path = write_list(tmp_path / "list.csv", rows)
    curation = {"min_caption": 2, "max_caption": 9}
    bench = Bench(tmp_path / "store", [path], clip={"weights": save_clip(tmp_path / "clip")}, curation=curation)
    bench.make(*STAGES)
    said = "codec: 0 training rows .*, which rejected 2 rows for caption_too_long and 1 row for caption_too_short; see"
    with pytest.raises(UserError, match=said):
        bench.make("codec")
