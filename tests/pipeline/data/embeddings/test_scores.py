from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from pipeline.data.embeddings.scores import load_heads
from pipeline.errors import UserError
from pipeline.graph.artifacts import read_table
from pipeline.graph.stages import stage_key
from pipeline.parse import ContentFile
from pipeline.store import open_store
from tests.pipeline.data.bench import Bench, picture, save_clip

DIM = 64  # of the nano preset's CLIP
ROWS = 7
STORE = open_store("never-written")
CAPTIONS = ["a", "three words here", "", "é" * 12, "no", "yes", "perhaps"]


def save_head(file: Path, seed: int, dim: int = DIM, bias: float = 0.5) -> torch.nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(dim, 1)
    linear.weight.data = torch.randn(1, dim, generator=generator)
    linear.bias.data.fill_(bias)
    save_file(linear.state_dict(), file)
    return linear


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Rows with the scores of two heads, whose files lie beside the list."""
    folder = tmp_path_factory.mktemp("scores")
    for i in range(ROWS):
        (folder / f"{i}.png").write_bytes(picture(i, 80 + i, 100))
    urls = [f"file://{folder}/{i}.png" for i in range(ROWS)]
    pq.write_table(pa.table({"url": urls, "caption": CAPTIONS}), folder / "list.parquet")
    save_head(folder / "aesthetic", 1)
    save_head(folder / "nsfw", 2, bias=-3)
    heads = {name: str(folder / name) for name in ("aesthetic", "nsfw")}
    clip = {"weights": save_clip(folder / "clip")}
    bench = Bench(folder / "store", [str(folder / "list.parquet")], clip=clip, embeddings={"heads": heads})
    bench.make("source", "captions", "pairs", "clip", "embeddings")
    return bench


def with_heads(bench: Bench, heads: dict[str, Path], **curation: Any) -> Bench:
    """A bench of the same rows with other heads; what was made before them stands."""
    embeddings = {"heads": {name: str(file) for name, file in heads.items()}}
    clip = {"weights": bench.config.clip.weights}
    return Bench(Path(bench.store.url), bench.config.source.paths, clip=clip, embeddings=embeddings, curation=curation)


def embedded(bench: Bench) -> pa.Table:
    [(_, blobs)] = bench.blobs("embeddings")
    return read_table(bench.store, blobs["embeddings"])


def test_scores_are_those_of_a_linear_layer_on_unit_embeddings(bench: Bench, tmp_path: Path) -> None:
    table = embedded(bench)
    stored = torch.from_numpy(np.array(table["image_embedding"].to_pylist(), np.float32))
    layers = {"aesthetic": save_head(tmp_path / "a", 1), "nsfw": save_head(tmp_path / "b", 2, bias=-3)}
    for name, layer in layers.items():
        expected = layer(torch.nn.functional.normalize(stored, dim=1))[:, 0].detach()
        scores = torch.tensor(table[f"score_{name}"].to_pylist())
        torch.testing.assert_close(scores, expected, rtol=0, atol=5e-3)  # of float16 numbers
        assert scores.std() > 0.02
    assert table["score_nsfw"].type == pa.float32()
    assert table["width"].to_pylist() == [80 + i for i in range(ROWS)]
    assert table["height"].to_pylist() == [100] * ROWS
    assert table["caption_length"].to_pylist() == [len(caption) for caption in CAPTIONS]


def _named(file: Path) -> ContentFile:
    return ContentFile.at(str(file), "embeddings.heads")


def test_a_score_does_not_depend_on_neighbours(tmp_path: Path) -> None:
    save_head(tmp_path / "a", 3, dim=768)
    head = load_heads(STORE, {"a": _named(tmp_path / "a")}, 768)["a"]
    rows = np.random.default_rng(0).normal(size=(33, 768)).astype(np.float32)
    alone = np.concatenate([head(row[None]) for row in rows])
    assert head(rows).tobytes() == alone.tobytes()
    assert head(rows).dtype == np.float32


def test_content_is_in_the_key_and_the_path_is_not(bench: Bench, tmp_path: Path) -> None:
    def key(file: Path) -> str:
        stage = with_heads(bench, {"aesthetic": file}).graph["embeddings"]
        return stage_key(stage, {"pairs": "p", "captions": "c", "clip": "k"})

    save_head(tmp_path / "a", 1)
    save_head(tmp_path / "moved", 1)
    save_head(tmp_path / "other", 2)
    assert key(tmp_path / "a") == key(tmp_path / "moved") != key(tmp_path / "other")


def test_a_head_that_is_none_is_one_line(tmp_path: Path) -> None:
    save_head(tmp_path / "wide", 1, dim=768)
    (tmp_path / "text").write_text("no tensors here")
    save_file({"weight": torch.zeros(1, DIM)}, tmp_path / "no-bias")
    save_file({"weight": torch.full((1, DIM), torch.nan), "bias": torch.zeros(1)}, tmp_path / "nan")
    save_file({"weight": torch.zeros(1, DIM, dtype=torch.bfloat16)}, tmp_path / "bf16")
    for name, said in (
        ("bf16", "not a safetensors file of fp32 or fp16"),
        ("wide", r"weight \[1, 64\] and bias \[1\]"),
        ("text", "not a safetensors file of fp32 or fp16"),
        ("no-bias", r"a head of this CLIP has"),
        ("nan", "NaN or Inf"),
    ):
        with pytest.raises(UserError, match=rf"embeddings\.heads\.aesthetic: .*{said}"):
            load_heads(STORE, {"aesthetic": _named(tmp_path / name)}, DIM)
    save_head(tmp_path / "changed", 1)
    before = _named(tmp_path / "changed")
    save_head(tmp_path / "changed", 2)
    with pytest.raises(UserError, match="changed during this command"):
        load_heads(STORE, {"aesthetic": before}, DIM)


@pytest.mark.parametrize(
    ("heads", "curation", "said"),
    [
        ({"aesthetic": "none"}, {}, r"embeddings\.heads\.aesthetic: .*none cannot be read"),
        ({"Watermark-2": "aesthetic"}, {}, "'Watermark-2' is not the name of a column"),
        ({}, {"max_score": {"nsfw": 0.1}}, r"curation\.max_score\.nsfw: embeddings\.heads has no nsfw"),
    ],
)
def test_a_head_that_cannot_be_had_stops_the_plan(
    bench: Bench, heads: dict[str, str], curation: dict[str, Any], said: str
) -> None:
    folder = Path(bench.config.source.paths[0]).parent
    with pytest.raises(UserError, match=said):
        with_heads(bench, {name: folder / file for name, file in heads.items()}, **curation)


@pytest.mark.parametrize("bound", ["min_score", "max_score"])
def test_curation_goes_by_a_score(bench: Bench, bound: str) -> None:
    table = embedded(bench).to_pydict()
    scores = dict(zip(table["key"], table["score_aesthetic"], strict=True))
    median = sorted(scores.values())[ROWS // 2]
    folder = Path(bench.config.source.paths[0]).parent
    heads = {name: folder / name for name in ("aesthetic", "nsfw")}
    again = with_heads(bench, heads, **{bound: {"aesthetic": median}})
    again.made |= bench.made
    again.make("curation")
    kept = {key for key, score in scores.items() if (score >= median if bound == "min_score" else score <= median)}
    assert [row["key"] for row in again.rows("curation")] == sorted(kept - {f"{CAPTIONS.index(''):012d}"})
    assert 2 <= len(kept) < ROWS - 1
