"""Every ``--from`` takes a run's output folder wherever it was moved, and a bundle's folder.

``unclip export`` writes one. Projects and their releases: test_docs.py, test_signed_release.py.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from jobs.bundles import find_bundle
from jobs.cli import main
from pipeline.errors import UserError
from pipeline.graph.artifacts import load_artifact
from pipeline.store.records import blob_path
from tests.chain import done, here, refused

Draw = Callable[..., list[Path]]


def pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()


def test_a_run_that_was_moved_draws_the_same(run: Path, draw: Draw, tmp_path: Path) -> None:
    (before,) = draw("sample", "a red heart")
    file = before.read_bytes()
    assert str(tmp_path) not in (run / "bundle.json").read_text()
    shutil.move(run, tmp_path / "elsewhere")
    (after,) = draw("sample", "a red heart", "--from", "elsewhere")
    assert after == Path("elsewhere/samples") / before.name
    assert after.read_bytes() == file
    shutil.rmtree("elsewhere/store")  # the bundle's copy stays
    assert draw("sample", "a red heart", "--from", "elsewhere")[0].read_bytes() == file


def test_a_bundles_folder_draws_with_every_command(run: Path, draw: Draw, tmp_path: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "a bundle").rglob("*")}
    (sampled,) = draw("sample", "a red heart", "--from", "a bundle")
    assert sampled.parent == Path("out/a bundle/samples")
    (edited, *_) = draw("edit", "priors", "a red heart", "--from", "a bundle")
    assert edited.parent == Path("out/a bundle/edits")
    Path("prompts.txt").write_text("a red heart\n")
    draw("generate", "prompts.txt", "--from", "a bundle", "--workers", 0, "--batch", 1)
    assert Path("out/a bundle/generated/00000.tar").is_file()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a bundle").rglob("*")} == files
    assert Image.open(sampled).size == (64, 64)


def test_what_is_not_a_bundle_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished bundle there; name a run's output folder"):
        find_bundle(str(tmp_path / "nowhere"))
    (tmp_path / "secret").write_text("key")
    (tmp_path / "a bundle/README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"a bundle/README.md: cannot be read .*; copy the bundle with cp -rL"):
        find_bundle(str(tmp_path / "a bundle"))
    (tmp_path / "a bundle/README.md").unlink()
    (tmp_path / "a bundle/clip").rename(tmp_path / "elsewhere")
    (tmp_path / "a bundle/clip").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"cannot be read .*; copy the bundle with cp -rL"):
        find_bundle(str(tmp_path / "a bundle"))
    for key in ("../../../secret", 7):
        (run / "bundle.json").write_text(json.dumps({"store": "store", "bundle": key}))
        with pytest.raises(UserError, match="no finished bundle there"):
            find_bundle(str(run))


@pytest.mark.parametrize("words", [("sample", "a red heart", "--from"), ("export", "--to", "shared")])
def test_a_damaged_bundle_is_one_line_that_names_the_command(
    words: tuple[str, ...], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = find_bundle(str(run))
    store = bundle.store
    assert store is not None
    Path(store.url, blob_path(bundle.blobs["decoder/model.safetensors"])).write_bytes(b"rot")
    assert main([*words, str(run)]) == 2
    assert "quarantines it, and the next run makes it again" in capsys.readouterr().err
    assert load_artifact(store, "bundle", bundle.key) is not None
    assert not Path("shared").exists()


def test_a_bundle_travels(run: Path, draw: Draw, tmp_path: Path) -> None:
    before = pixels(draw("sample", "a red heart")[0])
    shutil.rmtree(run / "bundle")
    said = done(here("export", run, "--to", tmp_path / "a folder", cwd=tmp_path))
    assert f"next: unclip sample \"a red heart\" --from '{tmp_path / 'a folder'}'" in said
    said = done(here("export", run, "--to", tmp_path / "shared", cwd=tmp_path))
    assert not (run / "bundle").exists()  # no copy is left behind
    assert 'next: unclip sample "a red heart" --from' in said
    bundle = find_bundle(str(run))
    shared = find_bundle(str(tmp_path / "shared")).blobs
    assert {name: blob for name, blob in shared.items() if name != "README.md"} == bundle.blobs
    assert ModelCard.load(tmp_path / "shared/README.md").data.pipeline_tag == "text-to-image"
    for file in (tmp_path / "shared").rglob("*.*"):
        assert str(tmp_path).encode() not in file.read_bytes(), file
    shutil.rmtree(run)
    (after,) = draw("sample", "a red heart", "--from", "shared")
    assert pixels(after) == before


def test_to_diffusers_and_back(run: Path, draw: Draw, tmp_path: Path) -> None:
    before = pixels(draw("sample", "a red heart")[0])
    (tmp_path / "a bundle/README.md").write_text("# a card\n")
    said = done(here("export", tmp_path / "a bundle", "--to", "theirs", "--format", "diffusers", cwd=tmp_path))
    assert "classes of diffusers itself: diffusion_prior; all others are in ours/" in said
    assert (tmp_path / "theirs/README.md").read_text() == "# a card\n"
    says = ["diffusers' layout", "--to NEW makes a bundle of what unclip export wrote"]
    refused("sample", "a cat", "--from", tmp_path / "theirs", says=says)
    assert done(here("export", "theirs", "--to", "back", "-q", cwd=tmp_path)) == ""
    (after,) = draw("sample", "a red heart", "--from", "back")
    assert pixels(after) == before
    refused("export", run, "--to", tmp_path / "back", says=["is not empty; name a new folder"])
    refused("export", run, "a.b=1", "--to", tmp_path / "new", says=["a.b=1", "is not a project"])


@pytest.mark.parametrize("kind", ["bundle", "diffusers"])
def test_damage_is_one_line(kind: str, run: Path, tmp_path: Path) -> None:
    done(here("export", run, "--to", tmp_path / "made", "--format", kind))
    weights = next((tmp_path / "made").rglob("*.safetensors"))
    weights.write_bytes(b"not tensors")
    refused("export", tmp_path / "made", "--to", tmp_path / "again", "--format", "diffusers", says="is damaged ")
    assert not (tmp_path / "again").exists()
