"""Every ``--from`` takes a run's output folder wherever it was moved, a bundle's folder, a project and its release."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from jobs.bundles import find_bundle
from jobs.cli import main
from pipeline.errors import UserError
from pipeline.graph.artifacts import load_artifact
from pipeline.store.records import blob_path
from tests.jobs.releases import LATER, OTHER, Made

Draw = Callable[..., list[Path]]


def test_a_run_that_was_moved_draws_the_same(run: Path, draw: Draw, tmp_path: Path) -> None:
    (before,) = draw("sample", "a red heart")
    pixels = before.read_bytes()
    assert str(tmp_path) not in (run / "bundle.json").read_text()
    shutil.move(run, tmp_path / "elsewhere")
    (after,) = draw("sample", "a red heart", "--from", "elsewhere")
    assert after == Path("elsewhere/samples") / before.name
    assert after.read_bytes() == pixels
    shutil.rmtree("elsewhere/store")  # the bundle's copy stays
    assert draw("sample", "a red heart", "--from", "elsewhere")[0].read_bytes() == pixels


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


def test_a_project_and_its_release(made: Made) -> None:
    first = made.make(0.0)
    assert find_bundle(str(made.path)).key == first
    with pytest.raises(UserError, match="no current release exists yet"):
        find_bundle(f"release:{made.path}")
    made.make(0.1, OTHER)
    made.release("promote", *LATER)
    assert find_bundle(f"release:{made.path}").key == made.current != first


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
