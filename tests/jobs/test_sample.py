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
from jobs.drawing import SLUG_BYTES, file_name, slug
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.ledger import Ledger
from pipeline.store import open_store
from pipeline.store.records import put_blob
from tests.jobs.test_mistakes import refused
from tests.models.test_cascade import make

Draw = Callable[..., list[Path]]


def test_requests_that_differ_have_files_of_their_own(draw: Draw) -> None:
    """Captions of other scripts, of other case and marks alone, and other settings."""
    files = draw("sample", "a red heart", "寺", "красное сердце", "A red heart!", "❤️")
    other = [
        draw("sample", "a red heart", *more)[0] for more in (("--set", "decoder_guidance=2"), ("--set", "prior=ar"))
    ]
    assert len({str(name).casefold() for name in (*files, *other)}) == 7
    assert files[1].name.startswith("寺-")
    assert files[2].name.startswith("красное-сердце-")
    assert draw("sample", "a red heart")[0] == files[0]
    assert draw("sample", "a red heart", "--set", "candidates=2")[0] == files[0]  # the bundle's own value
    assert len(list(Path("out/nano/samples").iterdir())) == 7


def test_another_bundle_has_other_files(draw: Draw, tmp_path: Path) -> None:
    (first,) = draw("sample", "a red heart")
    replace(make(), ar_prior=None, codec=None).save(tmp_path / "second")
    store = open_store("out/nano/store")
    files = [path for path in (tmp_path / "second").rglob("*") if path.is_file()]
    blobs = {str(path.relative_to(tmp_path / "second")): put_blob(store, path) for path in files}
    publish_artifact(store, Artifact("bundle", "c" * 64, {}, {}, Ledger(), blobs), 0.0)
    remember_bundle(Path("out/nano"), store.url, "c" * 64)
    (second,) = draw("sample", "a red heart")
    assert second != first


def test_a_folder_of_ones_own_and_settings_in_the_file(draw: Draw) -> None:
    (file,) = draw("sample", "a cät", "-o", "mine/here", "--seed", "3")
    assert file.parent == Path("mine/here")
    text: Any = Image.open(file).info
    assert (text["caption"], text["seed"]) == ("a cät", "3")
    assert json.loads(text["settings"])["decoder_steps"] == 2


def test_a_size_that_the_bundle_cannot_draw_is_said(
    draw: Draw, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    replace(make(), upsampler_1024=None).save(tmp_path / "small")
    steps = ("decoder_steps=2", "prior_steps=2", "--from", tmp_path / "small")
    with caplog.at_level("INFO", "unclip"):
        (file,) = draw("sample", "a cat", "size=1024", *steps, few=False)
        assert f"size=1024: this bundle draws up to {Image.open(file).width} px" in caplog.text
        caplog.clear()
        draw("sample", "a cat", *steps, few=False)
    assert "this bundle draws" not in caplog.text


def test_several_images_of_a_caption_have_the_next_seeds_and_one_may_have_a_file(draw: Draw) -> None:
    files = draw("sample", "a cat", "a dog", "-n", "2", "--seed", "3")
    texts: Any = [Image.open(file).info for file in files]
    assert [(text["caption"], text["seed"]) for text in texts] == [
        ("a cat", "3"), ("a cat", "4"), ("a dog", "5"), ("a dog", "6")
    ]  # fmt: skip
    assert draw("sample", "a cat", "num_images=2", "seed=3") == files[:2]
    assert draw("sample", "a cat", "-o", "mine.png") == [Path("mine.png")]
    assert Image.open("mine.png").size == (64, 64)


def test_captions_and_seeds_are_checked_before_any_is_drawn(run: Path) -> None:
    refused("sample", "a red heart", "tree " * 80, says="caption 2 has 80 tokens", cwd=Path())
    refused("sample", "a red heart", "--seed", 2**63, says=f"seed {2**63} is too large", cwd=Path())
    assert not list((run / "samples").glob("*"))


@pytest.mark.parametrize("part", ["clip", "decoder/model.safetensors", "decoder/config.json"])
@pytest.mark.parametrize("text", ["", "version https://git-lfs.github.com/spec/v1\n"])  # it is not there, or on git-lfs
def test_a_bundle_that_misses_a_part_is_told_in_a_line(run: Path, part: str, text: str) -> None:
    place = Path("a bundle") / part
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()
        if text:
            place.write_text(text)
    Path("list.txt").write_text("a red fox\n")
    name, where = part.split("/")[0], ("--from", "a bundle", "-o", "made")
    refused("sample", "a red fox", *where, says=name, cwd=Path())
    refused("generate", "list.txt", "--workers", 0, *where, says=name, cwd=Path())
    with pytest.raises(UserError, match=name):
        unclip.load("a bundle")


@pytest.mark.usefixtures("run")
def test_too_little_memory_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object, **__: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr("models.cascade.UnCLIP.decode", lacking)
    says = "does not fit into memory; ask for fewer images at once, a smaller size"
    refused("sample", "a red heart", "--set", "size=64", says=says, cwd=Path())


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
    both = itertools.product(captions, (1, 2))
    names = {file_name(caption, {"caption": caption, "steps": steps}, 0).lower() for caption, steps in both}
    assert len(names) == 12
