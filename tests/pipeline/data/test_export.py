"""What is exported is read by other tools, holds the curated rows and no other, and comes back in."""

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from embedding_reader import EmbeddingReader
from PIL import Image

from pipeline.data.card import MOST_LICENCES, CardCounts, _size, data_card
from pipeline.data.embeddings.parts import read_embeddings
from pipeline.data.export import _reference, export_pairs
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.data.source.imported import embedding_reference, read_imported
from pipeline.data.source.recipe import SourceRecipe
from pipeline.errors import UserError
from pipeline.graph.artifacts import read_shards, read_table
from pipeline.store import Store, open_store
from tests.pipeline.data.bench import Bench, picture, save_clip, write_listed

ROWS, SPLITS = 23, ["test", "validation", *["train"] * 21]
SMALL = (4, 15)  # below curation's least side; all rows of the last shard stay


@dataclass(frozen=True)
class Made:
    """The data stages of 23 rows, of which curation keeps 21, and their export."""

    bench: Bench
    folder: Path

    def rows(self) -> list[dict[str, Any]]:
        """The curated rows, each with its image and embeddings."""
        store, images = self.bench.store, {}
        vectors: dict[str, Any] = {}
        tars = {s.number: s.blobs["images"] for s in read_shards(store, self.bench.made["pairs"])}
        for row in self.bench.rows("curation"):
            (images[row["key"]],) = read_images(store, [Place.of(row, tars[int(row["key"][:8])])])
        for shard in read_shards(store, self.bench.made["embeddings"]):
            keys, image, text, _ = read_embeddings(store, shard.blobs["embeddings"])
            vectors |= dict(zip(keys, zip(image, text, strict=True), strict=True))
        return [
            row | {"image": images[row["key"]], "vectors": vectors[row["key"]]} for row in self.bench.rows("curation")
        ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("export")
    images = [picture(i, *((40, 40) if i in SMALL else (80, 72))) for i in range(ROWS)]
    paths = [write_listed(folder, images, SPLITS)]
    bench = Bench(folder / "store", paths, clip={"weights": save_clip(folder / "clip")})
    bench.make("source", "captions", "pairs", "clip", "embeddings", "curation")
    exported = Made(bench, folder / "exported")
    assert export_pairs(bench.store, bench.made, open_store(str(exported.folder))) == {
        "pairs": 21, "clip-retrieval": 21, "embeddings": 21,
    }  # fmt: skip
    return exported


def test_webdataset_and_img2datasets_files(made: Made) -> None:
    tars = sorted(map(str, (made.folder / "pairs").glob("*.tar")))
    assert [Path(tar).name for tar in tars] == ["00000.tar", "00001.tar", "00002.tar"]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    for sample, row in zip(samples, made.rows(), strict=True):
        assert (sample["__key__"], sample["jpg"]) == (row["key"], row["image"])
        about = json.loads(sample["json"])
        assert (about["caption"], about["split"], about["stored_sha256"]) == (
            sample["txt"].decode(),
            row["split"],
            row["sha256"],
        )
        assert Image.open(io.BytesIO(sample["jpg"])).size == (about["width"], about["height"])
    for tar in tars:
        rows = pq.read_table(tar.replace(".tar", ".parquet")).to_pylist()
        told = [json.loads(s["json"]) for s in samples if s["__url__"] == tar]
        assert rows == told
        stats = json.loads(Path(tar.replace(".tar", "_stats.json")).read_text())
        assert stats["count"] == stats["successes"] == stats["status_dict"]["success"] == len(rows)


def test_clip_retrievals_reader(made: Made) -> None:
    rows, folder = made.rows(), made.folder / "clip-retrieval"
    metadata: Any = {"metadata_folder": str(folder / "metadata"), "meta_columns": ["image_path", "caption"]}
    for place, (kind, options) in enumerate({"img_emb": metadata, "text_emb": {}}.items()):
        reader = EmbeddingReader(str(folder / kind), "parquet_npy" if options else "npy", **options)
        ((found, about),) = reader(batch_size=100, show_progress=False)
        assert np.array_equal(found, np.float32([row["vectors"][place] for row in rows]))
        if place == 0:
            assert list(about["image_path"]) == [row["key"] for row in rows]
            assert about["caption"][3] == f"picture {int(rows[3]['key'][-4:])}"


def test_datasets_of_hugging_face(made: Made, tmp_path: Path) -> None:
    options: Any = {"split": "train", "cache_dir": str(tmp_path)}
    pairs = datasets.load_dataset("webdataset", data_files=f"{made.folder}/pairs/*.tar", **options)
    rows = made.rows()
    assert pairs["__key__"] == [row["key"] for row in rows]
    assert pairs[0]["jpg"].size == (rows[0]["width"], rows[0]["height"])
    table = datasets.load_dataset("parquet", data_files=f"{made.folder}/embeddings/*.parquet", **options)
    assert np.array_equal(np.float16(table["image_embedding"]), [row["vectors"][0] for row in rows])


def test_a_shard_of_which_all_rows_stayed_is_a_link(made: Made) -> None:
    links = [os.stat(made.folder / f"embeddings/{i:05d}.parquet").st_nlink for i in range(3)]
    assert links == [1, 1, 2]


def test_it_goes_on_and_mixes_nothing(made: Made) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*.*")}
    (made.folder / "pairs/00001_stats.json").unlink()  # as if it had been killed there
    (made.folder / "pairs/00001.parquet").unlink()
    export_pairs(made.bench.store, made.bench.made, open_store(str(made.folder)))
    after = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*.*")}
    assert {path.name for path in after if after[path] != before[path]} == {"00001_stats.json", "00001.parquet"}
    with pytest.raises(UserError, match="holds an export of other rows"):
        export_pairs(made.bench.store, made.bench.made, open_store(str(made.folder)), splits=["train"])


def test_a_split_and_a_kind_alone_anywhere(made: Made, make_store: Callable[[], Store]) -> None:
    target = make_store()
    assert export_pairs(made.bench.store, made.bench.made, target, ["embeddings"], ["test"]) == {"embeddings": 1}
    assert [entry.path for entry in target.list("")] == ["README.md", "embeddings/00000.parquet", "export.json"]


def test_the_data_card_counts_what_is_there_and_what_is_not(made: Made) -> None:
    card = (made.folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["size_categories"] == ["n<1K"]
    assert "\n21 rows with 21 captions" in card
    assert "| test | 1 |\n| train | 19 |\n| validation | 1 |\n" in card
    assert "| none named | 21 |" in card
    assert "| curation | 21 | 2 too_small: " in card
    assert f"| curation | `{made.bench.made['curation'].key}` |" in card


def test_a_card_shows_what_strangers_wrote_as_plain_words() -> None:
    tally = CardCounts()
    rows = [{"split": "train", "captions": ["a", "b"], "license": f"l{i}"} for i in range(MOST_LICENCES + 5)]
    tally.add([{"split": "train", "captions": ["a"], "license": "<b>|\n# [x](y)"}] * 9 + rows)
    assert len(tally.licences) == MOST_LICENCES + 1
    card = data_card("mine", ["/secret/folder/pairs.csv"], {}, tally)
    assert "| &lt;b&gt;\\| \\# \\[x\\](y) | 9 |\n| further ones | 6 |\n" in card
    assert "| others | 981 |" in card
    assert "secret" not in card
    sizes = {999: "n<1K", 1000: "1K<n<10K", 10**6: "1M<n<10M", 10**9: "n>1B"}
    assert {count: _size(count) for count in sizes} == sizes


def test_what_came_out_goes_in(made: Made, tmp_path: Path) -> None:
    """Shards and embeddings become projects of the same rows and captions. The hash of what is stored does not stand
    where a list has that of what its URLs give."""
    for table in ("pairs/00000.parquet", "clip-retrieval/metadata/metadata_00000.parquet"):
        assert SourceRecipe(("a",)).hash_column not in pq.read_schema(made.folder / table).names
    rows = made.rows()
    again = Bench(tmp_path / "again", sorted(map(str, (made.folder / "pairs").glob("*.tar"))))
    again.make("source", "captions", "pairs")
    found = [row for row in again.rows("pairs") if row["status"] == "kept"]
    assert [row["sha256"] for row in found] == [row["sha256"] for row in rows]
    clip = {"weights": made.bench.config.clip.weights}
    imported = Bench(tmp_path / "imported", [str(made.folder / "clip-retrieval")], clip=clip)
    imported.make("source")
    shards = read_shards(imported.store, imported.made["source"])
    urls = [row["url"] for s in shards for row in read_table(imported.store, s.blobs["refs"]).to_pylist()]
    np.testing.assert_array_equal(read_imported(urls), np.float32([row["vectors"] for row in rows]))


def test_an_imported_embedding_leaves_with_the_url_of_its_image() -> None:
    """By which deny lists and ``forget`` find it when it is read again; what signs a URL stays here."""
    plain, signed = "https://host.test/1.jpg", "https://host.test/1.jpg?X-Amz-Signature=abcdef"
    assert _reference(embedding_reference(Path("/data/laion"), "2", 1, plain)) == plain
    assert "abcdef" not in _reference(embedding_reference(Path("/data/laion"), "2", 1, signed))
    assert _reference("file:///home/ana/1.jpg") == "1.jpg"
