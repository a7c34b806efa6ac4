from pathlib import Path

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
def listed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("scores")
    for i in range(ROWS):
        (folder / f"{i}.png").write_bytes(picture(i, 80 + i, 100))
    urls = [f"file://{folder}/{i}.png" for i in range(ROWS)]
    pq.write_table(pa.table({"url": urls, "caption": CAPTIONS}), folder / "list.parquet")
    return str(folder / "list.parquet"), save_clip(folder / "clip")


def make_bench(folder: Path, listed: tuple[str, str], **heads: Path) -> Bench:
    embeddings = {"heads": {name: str(file) for name, file in heads.items()}}
    return Bench(folder, [listed[0]], clip={"weights": listed[1]}, embeddings=embeddings)


def test_scores_are_those_of_a_linear_layer_on_unit_embeddings(listed: tuple[str, str], tmp_path: Path) -> None:
    layers = {"aesthetic": save_head(tmp_path / "a", 1), "nsfw": save_head(tmp_path / "b", 2, bias=-3)}
    bench = make_bench(tmp_path / "store", listed, aesthetic=tmp_path / "a", nsfw=tmp_path / "b")
    bench.make("source", "captions", "pairs", "clip", "embeddings")
    (_, blobs), *more = bench.blobs("embeddings")
    assert not more
    table = read_table(bench.store, blobs["embeddings"])
    stored = torch.from_numpy(np.array(table["image_embedding"].to_pylist(), np.float32))
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


def test_content_is_in_the_key_and_the_path_is_not(listed: tuple[str, str], tmp_path: Path) -> None:
    def key(file: Path) -> str:
        stage = make_bench(tmp_path / "store", listed, aesthetic=file).graph["embeddings"]
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
    with pytest.raises(UserError, match="has changed since"):
        load_heads(STORE, {"aesthetic": before}, DIM)


def test_a_head_that_is_absent_or_has_an_odd_name_stops_the_plan(listed: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"embeddings\.heads\.aesthetic: .*none cannot be read"):
        make_bench(tmp_path, listed, aesthetic=tmp_path / "none")
    save_head(tmp_path / "a", 1)
    with pytest.raises(UserError, match="'Watermark-2' is not the name of a column"):
        make_bench(tmp_path, listed, **{"Watermark-2": tmp_path / "a"})


def test_curation_goes_by_a_score(listed: tuple[str, str], tmp_path: Path) -> None:
    save_head(tmp_path / "a", 1)
    bench = make_bench(tmp_path / "store", listed, aesthetic=tmp_path / "a")
    bench.make("source", "captions", "pairs", "clip", "embeddings")
    table = read_table(bench.store, bench.blobs("embeddings")[0][1]["embeddings"]).to_pydict()
    scores = dict(zip(table["key"], table["score_aesthetic"], strict=True))
    median = sorted(scores.values())[ROWS // 2]
    for bound, kept in (("min_score", lambda s: s >= median), ("max_score", lambda s: s <= median)):
        changes = {
            "embeddings": {"heads": {"aesthetic": str(tmp_path / "a")}},
            "curation": {bound: {"aesthetic": median}},
        }
        again = Bench(tmp_path / "store", [listed[0]], clip={"weights": listed[1]}, **changes)
        again.make("source", "captions", "pairs", "clip", "embeddings", "curation")
        expected = [key for key, score in scores.items() if kept(score) and key != f"{CAPTIONS.index(''):012d}"]
        assert [row["key"] for row in again.rows("curation")] == expected
        assert 2 <= len(expected) < ROWS - 1
        assert again.made["embeddings"] == bench.made["embeddings"]


def test_a_bound_on_a_score_that_nobody_makes_is_a_mistake(listed: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"curation\.max_score\.nsfw: embeddings\.heads has no nsfw"):
        Bench(tmp_path / "store", [listed[0]], curation={"max_score": {"nsfw": 0.1}})
