"""Embeddings in clip-retrieval's layout, without a picture anywhere; tests/jobs/test_docs.py trains a prior on them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.embeddings.parts import read_embeddings
from pipeline.data.pairs.lost import lost_lines, lost_text
from pipeline.data.source.forget import Request, find
from pipeline.data.source.journal import ListJournal
from pipeline.data.source.lists import read_rows
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.stage import scan
from pipeline.errors import CorruptObject, UserError
from pipeline.training.feed.tables import Tables, embedding_dim
from tests.pipeline.data.bench import Bench, picture, save_clip, write_list
from tests.pipeline.data.source.imported import DIM, NAN, PARTS, ROWS, ZERO, url, write_parts


@dataclasses.dataclass(frozen=True)
class Made:
    bench: Bench
    folder: Path
    image: np.ndarray
    text: np.ndarray


def make_bench(store: Path, paths: list[str], clip: str, **changes: Any) -> Bench:
    return Bench(store, paths, clip={"weights": clip}, codec={"components": 8}, **changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("imported") / "laion with space"
    image, text = write_parts(folder)
    bench = make_bench(folder.parent / "store", [str(folder)], save_clip(folder.parent / "clip"))
    bench.make("source", "captions", "pairs", "clip", "embeddings", "curation")
    return Made(bench, folder, image, text)


def test_a_url_that_is_forgotten_or_denied_takes_its_embedding_along(made: Made, tmp_path: Path) -> None:
    source = made.bench.config.source
    found = find(made.bench.store, scan(source, made.bench.store, write=True).shards, None, Request.read([url(1)]))
    assert (found.rows, found.unseen) == (1, [])
    assert "&row=1#" in found.named[0][1]
    journal = ListJournal(forgotten=frozenset(found.marks))
    shards = scan(source, made.bench.store, write=True, journal=journal).shards
    assert sum(shard.ledger.rejected.get("forgotten", 0) for shard in shards) == 1
    (tmp_path / "deny").write_text(url(2))
    deny = {"deny_urls": str(tmp_path / "deny")}
    bench = make_bench(tmp_path / "store", [str(made.folder)], made.bench.config.clip.weights, pairs=deny)
    bench.make("source", "pairs")
    assert bench.made["pairs"].ledger.rejected == {"denied": 1, "not_an_embedding": 2}
    assert bench.rows("pairs")[2]["reason"] == "denied"


def test_every_row_arrives_or_is_counted(made: Made) -> None:
    assert made.bench.made["pairs"].ledger.rejected == {"not_an_embedding": 2}
    assert made.bench.made["curation"].ledger.rejected == {"no_caption": 1}
    bench = made.bench
    pairs, curation = (bench.made[stage] for stage in ("pairs", "curation"))
    told = [line.split("\t")[:2] for line in lost_text(bench.store, pairs, curation).splitlines()[1:]]
    assert told.count(["no_caption", "rejected"]) == 1  # rows of both stages are listed
    assert len(told) == sum(pairs.ledger.lost.values()) + 1
    assert any(line.startswith("no_caption: ") for line in lost_lines(bench.store, pairs, curation, "a.yaml", "out"))
    rows = made.bench.rows("pairs")
    assert [i for i, row in enumerate(rows) if row["status"] != "kept"] == [NAN, ZERO]
    assert {row["license"] for row in rows} == {"CC0"}
    assert all(row["size"] is None for row in rows)
    assert not any("images" in blobs for _, blobs in made.bench.blobs("pairs"))


def test_embeddings_are_those_of_the_files_at_unit_norm(made: Made) -> None:
    parts = [read_embeddings(made.bench.store, blobs["embeddings"]) for _, blobs in made.bench.blobs("embeddings")]
    kept = [i for i in range(ROWS) if i not in (NAN, ZERO)]
    for i, expected in ((1, made.image), (2, made.text)):
        whole = expected[kept].astype(np.float64)
        unit = whole / np.linalg.norm(whole, axis=1, keepdims=True)
        np.testing.assert_allclose(np.concatenate([part[i] for part in parts]), unit, rtol=2**-11, atol=1e-6)
    keys = [row["key"] for row in made.bench.rows("pairs") if row["status"] == "kept"]
    assert [key for part in parts for key in part[0]] == keys
    assert embedding_dim(made.bench.store, made.bench.made["embeddings"]) == DIM


def test_a_row_is_in_the_split_of_its_picture(made: Made) -> None:
    recipe = made.bench.config.source
    splits = [row["split"] for row in made.bench.rows("pairs")]
    assert splits == [recipe.split_of(url(i)) for i in range(ROWS)]


def test_beside_pictures_only_these_teach_what_needs_them(made: Made, tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    rows = [(f"file://{tmp_path}/{i}.png", f"picture {i}", "train") for i in range(4)]
    paths = [str(made.folder), write_list(tmp_path / "list.csv", rows)]
    both = make_bench(tmp_path / "store", paths, made.bench.config.clip.weights)
    both.make("source", "captions", "pairs", "clip", "embeddings", "curation")
    assert [b for _, b in both.blobs("embeddings")][:-1] == [b for _, b in made.bench.blobs("embeddings")]
    inputs = {name: both.made[name] for name in ("pairs", "captions", "embeddings", "curation")}
    with_pictures = Tables(both.store, inputs, ("image",), "train", min_side=64)
    everything = Tables(both.store, inputs, ("tokens", "image_embedding"), "train", min_side=0)
    assert sum(with_pictures.counts) == 4 < sum(everything.counts)
    assert all(row.place for row in with_pictures.first(100))


def test_one_list_may_hold_both(made: Made, tmp_path: Path) -> None:
    """References to embeddings and to files in one shard; a model that learns from every picture says what is wrong."""
    (tmp_path / "a.png").write_bytes(picture(0))
    imported = [row["url"] for row in made.bench.rows("pairs") if row["status"] == "kept"][:3]
    urls = [*imported[:2], f"file://{tmp_path}/a.png", imported[2]]
    rows = [(url, f"caption {i}", "train") for i, url in enumerate(urls)]
    paths, source = [write_list(tmp_path / "list.csv", rows)], {"roots": [str(made.folder)]}
    mixed = make_bench(tmp_path / "store", paths, made.bench.config.clip.weights, source=source)
    mixed.make("source", "captions", "pairs", "clip", "embeddings")
    _, image, text, _ = read_embeddings(mixed.store, mixed.blobs("embeddings")[0][1]["embeddings"])
    for ours, theirs in ((image, 1), (text, 2)):
        expected = read_embeddings(made.bench.store, made.bench.blobs("embeddings")[0][1]["embeddings"])[theirs]
        assert np.array_equal(ours[[0, 1, 3]], expected[:3])
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-3)
    train = Bench(tmp_path / "store", paths, source=source, clip={"samples": 8, "batch": 8, "lanes": 1})
    with pytest.raises(UserError, match="has an imported embedding and no image to train on"):
        train.make("source", "captions", "pairs", "clip")


def test_files_that_change_or_go_are_named(made: Made, tmp_path: Path) -> None:
    image, _ = write_parts(tmp_path / "parts")
    bench = make_bench(tmp_path / "store", [str(tmp_path / "parts")], made.bench.config.clip.weights)
    bench.make("source", "captions", "pairs", "clip")
    image[1, 1] += 1
    np.save(tmp_path / "parts/img_emb/img_emb_2.npy", image[: PARTS["2"]])
    with pytest.raises(CorruptObject, match="the embedding of row 000000000001 has other values"):
        bench.make("embeddings")
    (tmp_path / "parts/img_emb/img_emb_2.npy").unlink()
    with pytest.raises(CorruptObject, match="the embedding of row 000000000000 has other values"):
        bench.make("embeddings")
    listed = write_list(tmp_path / "l.csv", [("embedding:///none?part=0&row=0", "c")])
    gone = make_bench(tmp_path / "other", [listed], "local-dir:x", source={"roots": ["/none"]})
    assert gone.make("source", "pairs").ledger.rejected == {"missing_file": 1}


def test_another_clip_is_a_mistake(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a CLIP cannot train on imported embeddings"):
        make_bench(tmp_path, [str(made.folder)], "train")
    for name in ("img_emb", "text_emb"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / f"{name}_0.npy", np.ones((2, 9), np.float32))
    (tmp_path / "metadata").mkdir()
    pq.write_table(pa.table({"url": ["a", "b"], "caption": ["a", "b"]}), tmp_path / "metadata/metadata_0.parquet")
    bench = make_bench(tmp_path / "store", [str(tmp_path)], made.bench.config.clip.weights)
    with pytest.raises(UserError, match=r"has 9 dimensions, but clip\.weights makes 64"):
        bench.make("source", "captions", "pairs", "clip", "embeddings")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("text_emb/text_emb_2.npy", "text_emb_2.npy: no such file; every part needs"),
        ("metadata/metadata_2.parquet", "metadata_2.parquet: no such file; every part needs"),
        ("shorter", r"part 2 has image embeddings \(13, 64\), text embeddings \(14, 64\) and 14 rows"),
        ("pickled", r"img_emb_2.npy holds object of shape \(14,\), not a matrix"),
        ("header", "part 2 cannot be read .img_emb_2.npy has a damaged header"),
        ("integers", "holds int64 of shape"),
        ("bare", "no column caption; it has url"),
    ],
)
def test_parts_that_do_not_belong_together_are_one_line(tmp_path: Path, damage: str, said: str) -> None:
    image, _ = write_parts(tmp_path)
    file = tmp_path / "img_emb/img_emb_2.npy"
    if damage == "shorter":
        np.save(file, image[:13])
    elif damage == "pickled":
        np.save(file, np.array([{"a": 1}] * 14, dtype=object), allow_pickle=True)
    elif damage == "header":
        data = file.read_bytes()
        file.write_bytes(data.replace(b"), }", b"    "))
    elif damage == "integers":
        np.save(file, np.ones((14, DIM), np.int64))
    elif damage == "bare":
        pq.write_table(pa.table({"url": [url(i) for i in range(14)]}), tmp_path / "metadata/metadata_2.parquet")
    else:
        (tmp_path / damage).unlink()
    with pytest.raises(UserError, match=said):
        list(read_rows(str(tmp_path), SourceRecipe((str(tmp_path),))))
