"""``unclip export``: a bundle leaves as a folder, draws the same there, and in diffusers' layout it comes back."""

import shutil
from pathlib import Path

import pytest

from jobs.bundles import find_bundle
from tests.chain import done, here
from tests.jobs.test_bundles import Draw
from tests.jobs.test_mistakes import refused


def test_a_bundle_travels(run: Path, draw: Draw, tmp_path: Path) -> None:
    before = draw("sample", "a red heart")[0].read_bytes()
    shutil.rmtree(run / "bundle")
    said = done(here("export", run, "--to", tmp_path / "a folder", cwd=tmp_path))
    assert f"next: unclip sample \"a red heart\" --from '{tmp_path / 'a folder'}'" in said
    said = done(here("export", run, "--to", tmp_path / "shared", cwd=tmp_path))
    assert not (run / "bundle").exists()  # no copy is left behind
    assert 'next: unclip sample "a red heart" --from' in said
    bundle = find_bundle(str(run))
    assert find_bundle(str(tmp_path / "shared")).blobs == bundle.blobs
    for file in (tmp_path / "shared").rglob("*.*"):
        assert str(tmp_path).encode() not in file.read_bytes(), file
    shutil.rmtree(run)
    (after,) = draw("sample", "a red heart", "--from", "shared")
    assert after.read_bytes() == before


def test_to_diffusers_and_back(run: Path, draw: Draw, tmp_path: Path) -> None:
    before = draw("sample", "a red heart")[0].read_bytes()
    (tmp_path / "a bundle/README.md").write_text("# a card\n")
    said = done(here("export", tmp_path / "a bundle", "--to", "theirs", "--format", "diffusers", cwd=tmp_path))
    assert "in classes of diffusers: diffusion_prior; all others are in ours/" in said
    assert (tmp_path / "theirs/README.md").read_text() == "# a card\n"
    says = ["diffusers' layout", "--to NEW makes a bundle of what unclip export wrote"]
    refused("sample", "a cat", "--from", tmp_path / "theirs", says=says)
    assert done(here("export", "theirs", "--to", "back", "-q", cwd=tmp_path)) == ""
    (after,) = draw("sample", "a red heart", "--from", "back")
    assert after.read_bytes() == before
    refused("export", run, "--to", tmp_path / "back", says=["is not empty; name a new folder with --to"])
    refused("export", run, "a.b=1", "--to", tmp_path / "new", says=["a.b=1", "is not a project"])


@pytest.mark.parametrize("kind", ["bundle", "diffusers"])
def test_damage_is_one_line(kind: str, run: Path, tmp_path: Path) -> None:
    done(here("export", run, "--to", tmp_path / "made", "--format", kind))
    weights = next((tmp_path / "made").rglob("*.safetensors"))
    weights.write_bytes(b"not tensors")
    refused("export", tmp_path / "made", "--to", tmp_path / "again", "--format", "diffusers", says="is damaged ")
    assert not (tmp_path / "again").exists()
