"""Images of many prompts: the same for any neighbours, each once, and where they say they are."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import Artifact, read_shards
from pipeline.ledger import Ledger
from pipeline.sampling.generation import GenerationRecipe, export, generate
from pipeline.sampling.prompts import read_prompts
from pipeline.settings import GenerationSettings, RaySettings
from pipeline.store import Store
from pipeline.store.records import blob_path
from pipeline.upkeep.check import repair_store
from tests.pipeline.sampling.bundles import publish_bundle

PROMPTS = ["a red fox", "a blue house", "the sea", "a tree", "a cat under a tree"]
RECIPE = GenerationRecipe({"size": 64, "decoder_steps": 2}, batch=3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Artifact]:
    return publish_bundle(tmp_path_factory.mktemp("generation"))


def text(folder: Path, prompts: list[str]) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n\n".join(prompts) + "\n")
    return path


def run(bundle: tuple[Store, Artifact], path: Path, seed: int = 0, rows: int = 2, recipe: Any = RECIPE) -> Artifact:
    return generate(*bundle, read_prompts(path, seed, rows), recipe, GenerationSettings(workers=0), RaySettings())


def images(store: Store, made: Artifact, folder: Path) -> dict[tuple[str, int], bytes]:
    """PNG files by prompt and seed, as webdataset reads them; the tables must say the same."""
    tars = [str(path) for path in export(store, made, folder)]
    found = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        about = json.loads(sample["json"])
        assert (about["key"], about["prompt"]) == (sample["__key__"], sample["txt"].decode())
        found[about["prompt"], about["seed"]] = sample["png"]
    rows = [row for tar in tars for row in pq.read_table(tar.replace(".tar", ".parquet")).to_pylist()]
    kept = [row for row in rows if row["status"] == "kept"]
    assert [row["key"] for row in rows] == [f"{i:010d}" for i in range(len(rows))]
    assert {(row["prompt"], row["seed"]) for row in kept} == found.keys()
    assert all(-1 <= row["similarity"] <= 1 for row in kept)
    return found


def test_a_image_depends_on_its_prompt_and_seed_alone(bundle: tuple[Store, Artifact], tmp_path: Path) -> None:
    """Other neighbours, other shards, another place in its batch: the same bytes."""
    store = bundle[0]
    whole = images(store, run(bundle, text(tmp_path, PROMPTS)), tmp_path / "whole")
    assert list(whole) == [(prompt, i) for i, prompt in enumerate(PROMPTS)]
    assert len(set(whole.values())) == 5
    with Image.open(io.BytesIO(whole["the sea", 2])) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")
    table = {"prompt": PROMPTS[::-1], "seed": [4, 3, 2, 1, 0]}
    pq.write_table(pa.table(table), tmp_path / "other.parquet")
    other = images(store, run(bundle, tmp_path / "other.parquet", rows=4), tmp_path / "other")
    assert other == whole
    seeded = images(store, run(bundle, text(tmp_path, PROMPTS[1:3]), seed=1), tmp_path / "seeded")
    assert seeded == {key: whole[key] for key in list(whole)[1:3]}


def test_what_is_made_is_not_made_again(bundle: tuple[Store, Artifact], tmp_path: Path) -> None:
    made = run(bundle, text(tmp_path, PROMPTS[:4]), seed=50)
    longer = run(bundle, text(tmp_path, PROMPTS), seed=50)
    again = run(bundle, text(tmp_path, PROMPTS), seed=50)
    assert [a.times["shards_made"] for a in (made, longer, again)] == [2, 1, 1]  # the last adopts the record
    assert again.key == longer.key != made.key
    other = run(bundle, text(tmp_path, PROMPTS), seed=50, recipe=GenerationRecipe(RECIPE.options | {"prior": "ar"}, 3))
    assert other.times["shards_made"] == 3


def test_a_damaged_shard_is_made_again(bundle: tuple[Store, Artifact], tmp_path: Path) -> None:
    store = bundle[0]
    made = run(bundle, text(tmp_path, PROMPTS), seed=90)
    whole = images(store, made, tmp_path / "whole")
    blob = read_shards(store, made)[1].blobs["images"]
    store.delete([blob_path(blob)])
    with pytest.raises(CorruptObject) as damage:
        list(export(store, made, tmp_path / "again"))
    repair_store(store, "p", 0, [damage.value.path])
    assert images(store, run(bundle, text(tmp_path, PROMPTS), seed=90), tmp_path / "again") == whole


def test_a_folder_of_other_images_is_left_alone(bundle: tuple[Store, Artifact], tmp_path: Path) -> None:
    store = bundle[0]
    list(export(store, run(bundle, text(tmp_path, PROMPTS[:1])), tmp_path / "out"))
    with pytest.raises(UserError, match="out holds images of other prompts; name another folder"):
        list(export(store, run(bundle, text(tmp_path, PROMPTS[:1]), seed=7), tmp_path / "out"))


def test_a_row_that_cannot_be_drawn_costs_itself(
    bundle: tuple[Store, Artifact], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said before anything is drawn, counted, and in the table with its reason."""
    store = bundle[0]
    path = tmp_path / "prompts.jsonl"
    lines = [b'"a red fox"}', b'""}', b'"open', b'"caf\xe9"}', b'"the sea"}', b'"%b"}' % (b"tree " * 80)]
    path.write_bytes(b"".join(b'{"caption": %b\n' % line for line in lines))
    with caplog.at_level("WARNING", "unclip"):
        made = run(bundle, path)
    assert caplog.messages == ["not drawn: 1 row no_caption, 1 row malformed_row, 1 row not_utf8"]
    reasons = ("no_caption", "malformed_row", "not_utf8", "prompt_too_long")
    assert made.ledger == Ledger(kept=2, rejected=dict.fromkeys(reasons, 1))
    assert list(images(store, made, tmp_path / "out")) == [("a red fox", 0), ("the sea", 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 65}, "size is 65: use 64, 256 or 1024"),
        ({"prior_steps": 1}, "prior_steps is 1: use 2 or more"),
        ({"sise": 64}, "unknown sampling options"),
    ],
)
def test_options_that_the_bundle_cannot_take_are_refused(
    bundle: tuple[Store, Artifact], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(bundle, text(tmp_path, PROMPTS), seed=120, recipe=GenerationRecipe(options))
