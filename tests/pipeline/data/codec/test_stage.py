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
from pipeline.data.codec.recipe import CodecRecipe
from pipeline.data.codec.stage import CODEC, run_codec
from pipeline.errors import UserError
from pipeline.graph.stages import Context
from pipeline.store import open_store
from pipeline.store.records import read_blob
from tests.pipeline.data.vectors import Listed, context, curate, publish, unit

ROWS, DIM = 60, 16
RECIPE = CodecRecipe(components=12, buckets=16)
SPLITS = ["test" if i % 10 == 3 else "validation" if i % 10 == 7 else "train" for i in range(ROWS)]


def ready(folder: Path, rows: Listed, recipe: CodecRecipe = RECIPE, **curation: float) -> Context:
    """The context of a codec whose inputs are made of these rows."""
    store = open_store(str(folder))
    inputs = publish(store, rows, np.linspace(-1, 1, len(rows.splits), dtype=np.float32))
    inputs["curation"] = curate(store, inputs, near_duplicate=None, near_held_out=None, **curation)
    return context(store, replace(CODEC, recipe=recipe), inputs)


def drawn(rows: int, seed: int = 0) -> Listed:
    vectors = unit(np.random.default_rng(seed).standard_normal((rows, DIM)))
    return Listed(vectors, SPLITS[:rows], [64] * rows)


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return ready(tmp_path, drawn(ROWS))


def training_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Image embeddings of the training rows, in order, and their dot products with the text."""
    rows = drawn(ROWS)
    z = torch.from_numpy(rows.vectors[[split == "train" for split in SPLITS]].astype(np.float64))
    return z, (z * z.roll(1, 1)).sum(1)  # as publish makes texts


def test_it_is_the_codec_of_the_training_rows(ctx: Context) -> None:
    z, dots = training_rows()
    expected = fit_codec(z, dots, 12, 16)
    made = run_codec(ctx)
    found = load(read_blob(ctx.store, made.blobs["model.safetensors"]))
    torch.testing.assert_close(found, expected.codec.tensors(), rtol=1e-7, atol=1e-9)
    assert made.ledger.kept == made.metrics["rows"] == made.metrics["training_rows"] == len(z) == 48
    assert made.metrics["components"] == made.metrics["requested"] == 12
    assert made.metrics["explained"] == pytest.approx(sum(expected.explained))
    assert made.metrics["warnings"] == []
    codec = Codec(**found)
    error = (z - codec.decode(codec.encode(z))).square().sum(1).mean()
    assert made.metrics["round_trip_error"] == pytest.approx(float(error), rel=1e-6)
    assert made.metrics["round_trip_error"] > made.metrics["reconstruction_error"] > 0


def test_a_sample_has_the_size_that_is_asked_for(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """From every block its share; another seed draws other rows."""
    monkeypatch.setattr(fit, "BLOCK_ROWS", 20)
    taught = {row.tobytes() for row in training_rows()[0].numpy().astype(np.float16)}
    samples = []
    for seed in (0, 1):
        training, shards = fit.sample_training_rows(replace(ctx, recipe=replace(RECIPE, sample_rows=31, seed=seed)))
        parts = [numpy_load(read_blob(ctx.store, shard.blobs["sample"])) for shard in shards]
        sizes = [len(part["dot"]) for part in parts]
        assert (training, sizes) == (48, [12, 13, 6])  # of 20, 20 and 8 training rows
        samples.append({row.tobytes() for part in parts for row in part["image"]})
        assert len(samples[-1] & taught) == 31
    assert samples[0] != samples[1]


def test_more_components_than_rows_is_a_warning(tmp_path: Path) -> None:
    codec = run_codec(ready(tmp_path, replace(drawn(5), splits=["train"] * 5)))
    assert codec.metrics["components"] == 4
    assert codec.metrics["warnings"] == ["k lowered from 12 to 4, the rank of 5 embeddings"]
    assert codec.metrics["explained"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (replace(drawn(3), splits=["test"] * 3), "codec: 0 training rows are left after curation; see the report"),
        (replace(drawn(3), splits=["train", "validation", "test"]), "codec: 1 training rows are left after curation"),
        (replace(drawn(4), vectors=drawn(1).vectors[[0] * 4], splits=["train"] * 4), "all 4 embeddings are equal"),
    ],
)
def test_too_few_different_training_rows_is_a_mistake_of_the_user(tmp_path: Path, rows: Listed, said: str) -> None:
    ctx = ready(tmp_path, rows)
    with pytest.raises(UserError, match=said):
        run_codec(ctx)


def test_why_no_training_row_is_left(tmp_path: Path) -> None:
    ctx = ready(tmp_path, replace(drawn(3), sides=[16, 16, 64]), min_similarity=2)
    said = "codec: 0 training rows .*, which rejected 2 rows for too_small and 1 row for low_similarity; see"
    with pytest.raises(UserError, match=said):
        run_codec(ctx)
