"""``unclip sample``: a file for every request, whatever the script of its caption, and the same for the same one."""

import itertools
import json
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from tests.chain import refused
from tests.models.small_models import make

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


def test_a_size_that_the_bundle_does_not_draw_is_refused_everywhere(run: Path, tmp_path: Path) -> None:
    replace(make(), upsampler_1024=None).save(tmp_path / "small")
    says = "size is larger than what this bundle draws, which is 64 or 256 px: use size=256"
    Path("list.txt").write_text("a cat\n")
    Image.new("RGB", (64, 64)).save("cat.png")
    for words in (["sample", "a cat"], ["generate", "list.txt", "--workers", "0"], ["edit", "vary", "cat.png"]):
        for size in ("size=1024", "size=512x512") if words[0] != "generate" else ("size=1024",):
            refused(*words, size, "--from", "small", "-o", "made", says=says, cwd=Path())
    model = unclip.load("small")
    for call in (partial(model.generate, "a cat"), partial(model.vary, "cat.png")):
        for size in (1024, 512):
            with pytest.raises(ValueError, match=says):
                call(size=size, progress=False)
    image = model.generate("a cat", decoder_steps=2, prior_steps=2, progress=False)  # its default is not its own
    assert (image.width, image.recipe.options["size"]) == (64, 256)  # of these small models, 256 px are 64


def test_a_place_that_cannot_be_written_and_a_mask_that_does_not_fit_are_refused_before_models_are_loaded(
    draw: Draw,
) -> None:
    (first,) = draw("sample", "a cat")
    (Path("a bundle") / "decoder/model.safetensors").write_text("")  # loading it would end with this
    Path("list.txt").write_text("a cat\n")
    commands = (["sample", "a cat"], ["edit", "vary", first], ["redraw", first])
    for words in (*commands, ["generate", "list.txt", "--workers", "0"]):
        for place in ("/proc/here", *(["/proc/x.png"] if words in commands else [])):
            says = f"{place}: cannot be written (No such file or directory); name another place with --to"
            refused(*words, "--from", "a bundle", "-o", place, says=says, cwd=Path())
    Image.new("RGBA", (64, 32)).save("mask.png")
    says = "the mask is 64 x 32 and the image 64 x 64: give both the same shape"
    refused("edit", "inpaint", first, "mask.png", "a cat", "--from", "a bundle", says=says, cwd=Path())


def test_a_file_is_no_caption(draw: Draw) -> None:
    Path("my list.txt").write_text("a cat\n")
    says = "my list.txt: is a file, and sample takes captions; draw what it holds with unclip generate 'my list.txt'"
    refused("sample", "my list.txt", says=says, cwd=Path())
    draw("sample", "no list.txt", "-o", "a.png")
    refused("sample", "a cat", "a.png", says="draw what it holds with unclip redraw a.png", cwd=Path())


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
