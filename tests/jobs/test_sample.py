"""``unclip sample``: a file for every request, whatever the script of its caption, and the same for the same one."""

import itertools
import json
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import unclip
from jobs.bundles import remember_bundle
from jobs.cli import main
from jobs.sample import SLUG_BYTES, file_name, slug
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.ledger import Ledger
from pipeline.store import open_store
from pipeline.store.records import put_blob
from tests.models.test_cascade import make
from tests.pipeline.sampling.test_generation import publish_bundle

FEW = ("--set", "size=64", "--set", "decoder_steps=2", "--set", "prior_steps=2")
Sample = Callable[..., list[str]]


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sample:
    """Runs ``unclip sample`` in a folder with the bundle of a run, and returns the files that it names."""
    store, bundle = publish_bundle(tmp_path)
    remember_bundle(tmp_path / "out/nano", store.url, bundle.key)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.sampling.drawing.cores", torch.get_num_threads)

    def run(*words: str) -> list[str]:
        assert main(["sample", *words, *FEW]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_requests_that_differ_have_files_of_their_own(sample: Sample) -> None:
    """Captions of other scripts, of other case and marks alone, and other settings."""
    files = sample("a red heart", "寺", "красное сердце", "A red heart!", "❤️", "")
    other = [sample("a red heart", *more)[0] for more in (("--set", "decoder_guidance=2"), ("--set", "prior=ar"))]
    assert len({name.casefold() for name in (*files, *other)}) == 8
    assert Path(files[1]).name.startswith("寺-")
    assert Path(files[2]).name.startswith("красное-сердце-")
    assert sample("a red heart")[0] == files[0]
    assert sample("a red heart", "--set", "candidates=2")[0] == files[0]  # the bundle's own value
    assert len(list(Path("out/nano/samples").iterdir())) == 8


def test_another_bundle_has_other_files(sample: Sample, tmp_path: Path) -> None:
    (first,) = sample("a red heart")
    replace(make(), ar_prior=None, codec=None).save(tmp_path / "second")
    store = open_store(str(tmp_path / "store"))
    files = [path for path in (tmp_path / "second").rglob("*") if path.is_file()]
    blobs = {str(path.relative_to(tmp_path / "second")): put_blob(store, path) for path in files}
    publish_artifact(store, Artifact("bundle", "c" * 64, {}, {}, Ledger(), blobs), 0.0)
    remember_bundle(Path("out/nano"), store.url, "c" * 64)
    (second,) = sample("a red heart")
    assert second != first


def test_a_folder_of_ones_own_and_settings_in_the_file(sample: Sample) -> None:
    (file,) = sample("a cät", "-o", "mine/here", "--seed", "3")
    assert Path(file).parent == Path("mine/here")
    text: Any = Image.open(file).info
    assert (text["caption"], text["seed"]) == ("a cät", "3")
    assert json.loads(text["settings"])["decoder_steps"] == 2


def test_captions_and_seeds_are_checked_before_any_is_drawn(sample: Sample, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (["a red heart", "tree " * 80], "caption 2 has 80 tokens"),
        (["a red heart", "--seed", "-1"], "--seed -1 is below 0"),
        (["a red heart", "--seed", str(2**63)], f"--seed {2**63} is too large"),
    ):
        assert main(["sample", *words, *FEW]) == 2
        assert says in capsys.readouterr().err
    assert not list(Path("out/nano/samples").glob("*"))


@pytest.mark.parametrize("part", ["clip", "decoder/model.safetensors", "decoder/config.json"])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_bundle_that_misses_a_part_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, damaged: bool
) -> None:
    make().save(tmp_path / "shared")
    place = tmp_path / "shared" / part
    if damaged and place.is_file():  # as a file that only git-lfs would fetch
        place.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()
    (tmp_path / "list.txt").write_text("a red fox\n")
    for words in (["sample", "a red fox"], ["generate", str(tmp_path / "list.txt"), "--workers", "0"]):
        where = ["--from", str(tmp_path / "shared"), "-o", str(tmp_path / "made")]
        assert main([*words, *where, *FEW]) == 2, capsys.readouterr().err
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert part.split("/")[0] in line
    with pytest.raises(UserError, match=part.split("/")[0]):
        unclip.load(tmp_path / "shared")


def test_too_little_memory_is_told_in_a_line(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr("models.cascade.UnCLIP.decode", lacking)
    assert main(["sample", "a red heart", *FEW]) == 2
    assert "does not fit into memory; ask for fewer images at once, a smaller size" in capsys.readouterr().err


HOSTILE = ["../../etc/passwd", "CON", "a/b\\c:d*e?f", "‮evil‬", "\0", "é" * 200, "e\u0301" * 200, "\u0301", "İ", "ﬁ", "ẞ"]


@pytest.mark.parametrize("caption", [*HOSTILE, "한국어", "ภาษาไทย", "हिन्दी", "العربية", "\U0001f408"])
def test_a_slug_is_safe_on_every_file_system(caption: str) -> None:
    found = slug(caption)
    assert 0 < len(found.encode()) <= SLUG_BYTES
    assert found == unicodedata.normalize("NFC", found)
    assert not set(found) & set('/\\:*?"<>|. \0')
    assert all(unicodedata.category(c)[0] in "LMN" or c == "-" for c in found)
    assert unicodedata.category(found[0])[0] != "M"


def test_marks_of_a_script_stay() -> None:
    assert slug("हिन्दी ภาษาไทย!") == "हिन्दी-ภาษาไทย"
    assert slug("e\u0301tude") == "étude"


def test_names_differ_wherever_requests_do() -> None:
    captions = ["a cat", "A cat", "a cat.", "a, cat", "a  cat", "a cat\n"]
    names = {
        file_name(caption, {"caption": caption, "steps": steps}, 0)
        for caption, steps in itertools.product(captions, (1, 2))
    }
    assert len(names) == 12
    assert {name.lower() for name in names} == names
