"""An artefact is written below the folder that was chosen, whatever its files are called and what links are there."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from jobs.bundles import find_bundle, remember_bundle
from pipeline.config import load_config
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import Artifact, artifact_path
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.sampling.bundle import BUNDLE, run_bundle
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path, materialise, put_blob
from tests.chain import ROOT
from tests.pipeline.store.objects import ARTIFACT, AWAY, forge

Write = Callable[[Store, dict[str, str], Path], None]


@pytest.fixture(params=[materialise, partial(materialise, replace=True)], ids=["keep", "replace"])
def write(request: pytest.FixtureRequest) -> Write:
    return request.param


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where everything lies: beside the store and the folder a file that must not change."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious.txt").write_text("precious")
    return tmp_path


def _outside(place: Path) -> dict[str, str]:
    return {str(file): file.read_text() for file in place.rglob("*") if file.is_file() and "store" not in file.parts}


@pytest.mark.parametrize("name", [*AWAY, "../outside/precious.txt", "../outside/new.pth"])
def test_no_name_leads_out_of_the_folder(name: str, write: Write, place: Path) -> None:
    store, before = open_store(str(place / "store")), _outside(place)
    for spelling in (name, str(place / "outside/new.pth")):
        with pytest.raises(UserError, match="leads out of"):
            write(store, {spelling: put_blob(store, b"import os")}, place / "folder")
    assert _outside(place) == before


def test_no_link_leads_out_of_the_folder(write: Write, place: Path) -> None:
    store, folder = open_store(str(place / "store")), place / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(place / "outside")
    before = _outside(place)
    for name in ("link/precious.txt", "link/new.pth", "link/deeper/new.pth"):
        with pytest.raises(UserError, match="leads out of"):
            write(store, {name: put_blob(store, b"import os")}, folder)
    assert _outside(place) == before
    assert not (place / "outside/deeper").exists()


def test_a_link_in_the_place_of_a_file_is_not_followed(write: Write, place: Path) -> None:
    store, folder = open_store(str(place / "store")), place / "folder"
    folder.mkdir()
    (folder / "0000.png").symlink_to(place / "outside/new.pth")
    (folder / ".0000.png.part").symlink_to(place / "outside/new.pth")
    write(store, {"0000.png": put_blob(store, b"image")}, folder)
    assert not (folder / "0000.png").is_symlink()
    assert (folder / "0000.png").read_bytes() == b"image"
    assert not (place / "outside/new.pth").exists()


def test_images_replace_earlier_ones_and_other_files_are_not_read_again(place: Path) -> None:
    store, folder = open_store(str(place / "store")), place / "folder"
    for data in (b"one", b"two"):
        materialise(store, {"0000.png": put_blob(store, data)}, folder, replace=True)
        assert (folder / "0000.png").read_bytes() == data
    materialise(store, {"0000.png": put_blob(store, b"three"), "a/b": put_blob(store, b"ab")}, folder)
    assert {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == {
        "0000.png": b"two", "b": b"ab",
    }  # fmt: skip


def test_previews_stay_behind(place: Path) -> None:
    """They show validation images, and a bundle travels."""
    store, config = open_store(str(place / "store")), load_config(ROOT / "configs/nano.yaml")
    names = ("model.safetensors", "config.json", "metrics.jsonl", "preview.png", "previews/000000000640.png")
    blobs = {name: put_blob(store, name.encode()) for name in names}
    inputs = {name: Artifact(name, f"{name}-key", {}, {}, Ledger(), blobs) for name in config.bundle.inputs}
    ctx = Context(store, "bundle", BUNDLE.version, "k", config.bundle, None, inputs, given=config.source)
    made = run_bundle(ctx).blobs
    kept = {f"{part}/{name}" for part in inputs for name in names[:3]}
    assert made.keys() == kept | {"sampling.json", "README.md"}


def test_a_folder_behind_a_link_of_the_users_is_written(place: Path) -> None:
    store = open_store(str(place / "store"))
    (place / "real").mkdir()
    (place / "folder").symlink_to(place / "real")
    materialise(store, {"a/b": put_blob(store, b"ab")}, place / "folder")
    assert (place / "real/a/b").read_bytes() == b"ab"


def test_what_is_damaged_leaves_no_file(place: Path) -> None:
    store = open_store(str(place / "store"))
    blob = put_blob(store, b"1")
    store.delete([blob_path(blob)])
    with pytest.raises(CorruptObject):
        materialise(store, {"a/b": blob}, place / "folder")
    assert not [file for file in (place / "folder").rglob("*") if file.is_file()]


@pytest.mark.parametrize("absolute", [False, True])
def test_a_forged_bundle_writes_nothing(absolute: bool, place: Path) -> None:
    """What ``unclip sample``, ``edit`` and ``generate`` do first with a bundle of somebody else's store."""
    store, output = open_store(str(place / "store")), place / "out/theirs"
    evil = put_blob(store, b"import os")
    name = str(place / "outside/evil.pth") if absolute else os.path.relpath(place / "outside/evil.pth", output)
    forge(store, artifact_path("bundle", "k"), {**ARTIFACT, "inputs": {}, "blobs": {name: evil}})
    remember_bundle(output, store.url, "k")
    before = _outside(place)
    with pytest.raises(CorruptObject, match="is not a record that belongs there"):
        find_bundle(str(output))
    assert _outside(place) == before
