"""``unclip redraw``: the same pixels of the same recipe, what differs where something does, and no trust in it."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import unclip
from jobs.cli import main
from pipeline.errors import UserError
from pipeline.sampling.recipe import CHUNK_BYTES, ImageRecipe, describe, own_version, read_recipe, text_chunks
from serve.model_runner import ModelRunner
from serve.work import Work
from tests.chain import refused
from tests.models.small_models import IMAGES, make

Draw = Callable[..., list[Path]]
Redraw = Callable[..., list[str]]
FEW: Any = {"size": 64, "decoder_steps": 2, "prior_steps": 2}
SET = ("size=64", "decoder_steps=2")


@pytest.fixture
def redraw(run: Path, capsys: pytest.CaptureFixture[str]) -> Redraw:
    """Runs ``unclip redraw`` and returns its lines."""

    def redraw(*words: object) -> list[str]:
        capsys.readouterr()
        assert main(["redraw", *map(str, words)]) == 0
        return capsys.readouterr().out.splitlines()

    return redraw


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_sample_comes_again_to_the_last_bit(draw: Draw, redraw: Redraw) -> None:
    first, _ = draw("sample", "a red fox", "-n", "2", "--seed", "4", "--set", "guidance=2")
    path, *said = redraw(first)
    assert (pixels(path) == pixels(first)).all()
    assert said == ["  the same pixels"]
    assert Image.open(path).info == Image.open(first).info
    by_folder, *_ = redraw(first, "--from", "a bundle", "-o", "folder.png")  # the same files, without their store
    assert (pixels(by_folder) == pixels(first)).all()


def test_what_is_asked_for_in_place_of_the_recipe_is_said(draw: Draw, redraw: Redraw) -> None:
    (first,) = draw("sample", "a red fox")
    path, *said = redraw(first, "--seed", "9", "--guidance-scale", "3", "--caption", "a blue fox", "-o", "new.png")
    assert "of its pixels differ, by " in said[0]
    assert said[1:] == ["  caption: 'a red fox' -> 'a blue fox'", "  seed: 0 -> 9", "  decoder_guidance: 1.0 -> 2.0"]
    (expected,) = draw("sample", "a blue fox", "--seed", "9", "--set", "guidance=2")
    assert (pixels(path) == pixels(expected)).all()
    large, *said = redraw(first, "size=256", "-o", "large.png")
    assert (pixels(large).shape, said) == ((256, 256, 3), ["  256 px in place of 64", "  size: 64 -> 256"])
    assert len([line for line in redraw(first, "-n", "2", "-o", "two") if line.endswith(".png")]) == 2


def test_no_image_that_was_redrawn_is_overwritten_by_another_one(draw: Draw, redraw: Redraw) -> None:
    draw("sample", "a red fox", "-o", "fox.png")
    first, *_ = redraw("fox.png")
    before = Path(first).read_bytes()
    second, *_ = redraw("fox.png", "seed=5")
    assert first != second
    assert Path(first).read_bytes() == before
    assert redraw("fox.png", "--seed", "5")[0] == second
    third, *_ = redraw(second, "seed=0")
    assert third == first  # the same recipe: names do not grow
    assert Path(first).name.startswith("fox-")


def test_another_bundle_is_named(draw: Draw, redraw: Redraw, tmp_path: Path) -> None:
    (first,) = draw("sample", "a red fox")
    made = make()
    with_other = made.__class__(**{**vars(made), "ar_prior": None, "codec": None})
    with_other.save(tmp_path / "other")
    _, *said = redraw(first, "--from", "other")
    assert said[0] == "  the same pixels"  # its decoder and prior are the same
    assert said[1].startswith(f"  bundle: {'b' * 12} -> ")
    assert len(said) == 2  # nothing is to be done
    IMAGES[0].save("cat.png")
    assert main(["edit", "vary", "cat.png", "-n", "2", *SET, "-o", "strip.png"]) == 0
    for image, words in ((first, ["--seed", "5"]), (Path("strip.png"), [])):
        *_, last = redraw(image, "--from", "other", *words)
        assert last.startswith(
            f"  bundle {'b' * 12} drew it: name its run, project or release with --from. A copy has another key"
        )


def test_a_job_that_no_installation_names_draws_without_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code travels to a cluster without its metadata."""

    def version(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr("pipeline.sampling.recipe.version", version)
    own_version.cache_clear()
    try:
        drawn = ImageRecipe(caption="a fox").drawn({"size": 64}, "b" * 64)
    finally:
        own_version.cache_clear()
    assert (drawn.version, "version" in drawn.chunks()["made"]) == ("", False)


@pytest.mark.usefixtures("run")
def test_a_strip_comes_again_from_the_image_beside_it(redraw: Redraw, capsys: pytest.CaptureFixture[str]) -> None:
    IMAGES[0].save("cat.png")
    assert main(["edit", "vary", "cat.png", "-n", "2", *SET, "-o", "strip.png"]) == 0
    path, *said = redraw("strip.png", "-o", "again.png")
    assert (pixels(path) == pixels("strip.png")).all()
    assert said == ["  1: the image", "  2: seed 0", "  3: seed 1"]
    IMAGES[1].save("cat.png")
    refused("redraw", "strip.png", says="was made from cat.png, which is not beside it; name it", cwd=Path())
    *_, said_last = redraw("strip.png", "--image", "cat.png")
    assert said_last.startswith("  images: cat.png ")
    assert main(["edit", "change", "cat.png", "a", "b", "-n", "2", *SET, "-o", "single"]) == 0
    for file in capsys.readouterr().out.split():
        _, how, *_ = redraw(file)
        assert how == "  the same pixels" or "by 1 of 255" in how  # two were drawn at once


def test_an_image_of_python_and_one_of_the_server_carry_the_same_recipe(redraw: Redraw, run: Path) -> None:
    model = unclip.load(run)
    image = model.generate("a red fox", seed=3, progress=False, **FEW)
    image.save("python.png")
    [varied] = model.vary(image, n=1, progress=False, **FEW)
    with pytest.raises(ValueError, match="vary takes 1 images, not 0"):
        model.redraw(varied)
    assert np.asarray(model.redraw(varied, [image], progress=False)[0]).tolist() == np.asarray(varied).tolist()
    events: list[Any] = []
    recipe = describe("draw", FEW, caption="a red fox", seed=3, side=64)
    work = Work(recipe, recipe.rows)
    ModelRunner("b" * 64, model.cascade, 2).draw(work, events.append, lambda: False)
    [served] = [event[2] for event in events if event[0] == "image"]
    Path("served.png").write_bytes(served)
    for name in ("python.png", "served.png"):
        path, *said = redraw(name, "-o", f"again-{name}")
        assert said == ["  the same pixels"]
        assert (pixels(path) == pixels(name)).all()
    [again] = model.redraw("served.png", progress=False)
    assert (np.asarray(again) == pixels("served.png")).all()
    assert again.recipe == image.recipe == read_recipe(served, "served.png")
    [other] = model.redraw(image, progress=False, seed=4)
    assert other.recipe.seed == 4
    other.copy().save("copy.png")
    with pytest.raises(UserError, match=r"copy\.png: has no recipe"):
        model.redraw("copy.png")


def png(**chunks: str) -> bytes:
    info, out = PngInfo(), io.BytesIO()
    for name, value in chunks.items():
        info.add_itxt(name, value)
    Image.new("RGB", (4, 4)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


GOOD = {"caption": "a fox", "seed": "1", "settings": json.dumps(FEW)}


def test_recipes_go_into_chunks_and_come_back() -> None:
    whole = ImageRecipe(
        "change", "a dog", "a cat", seed=3, shares=(0.25,), options=FEW, side=64, bundle="b" * 64, version="1.2"
    )
    # Of the images that it begins with, a recipe names as many as its operation takes.
    with pytest.raises(UserError, match="change takes 1 images, not 0"):
        read_recipe(png(**whole.chunks()), "a.png")
    drawn = ImageRecipe("draw", "a dög\n", seed=2**53 - 1, options=FEW)
    assert read_recipe(png(**drawn.chunks()), "a.png") == drawn


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": "-1"}, "seed -1 is below 0"),
        ({"seed": "x"}, "invalid literal"),
        ({"seed": "9" * 5000}, "cannot be read"),
        ({"settings": "[]"}, "cannot be read"),
        ({"settings": "{" * 9000}, "cannot be read"),
        ({"settings": '{"size": NaN}'}, "cannot be read"),
        ({"settings": '{"candidates": 1000000000}'}, "candidates is 1000000000; use 1000 or less"),
        ({"settings": '{"decoder_steps": true}'}, "cannot be read"),
        ({"settings": '{"sise": 64}'}, "unknown sampling options"),
        ({"made": '{"n": 1000000}'}, "n is 1000000; use 1 to 1000"),
        ({"made": '{"operation": "rm"}'}, "unknown operation rm"),
        ({"made": '{"operation": "vary"}'}, "vary takes 1 images, not 0"),
        ({"made": '{"bundle": "../../etc"}'}, "not a key and a version"),
        ({"made": '{"images": [{"sha256": 7}]}'}, "cannot be read"),
        ({"made": '{"more": 1}'}, "more: unknown key"),
        ({"made": "7"}, "cannot be read"),
        ({"caption": "x" * 5000}, "caption has 5000 characters"),
        ({"caption": "x" * (CHUNK_BYTES + 1)}, "draw needs a caption"),
    ],
)
def test_a_recipe_of_a_stranger_is_refused_in_a_short_line(changes: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says) as refusal:
        read_recipe(png(**{**GOOD, **changes}), "a.png")
    assert len(str(refusal.value)) < 500


def test_chunks_are_read_without_unpacking_and_up_to_the_pixels() -> None:
    bomb = zlib.compress(bytes(1 << 20))
    body = b"seed\0\1\0\0\0" + bomb
    chunk = struct.pack(">I", len(body)) + b"iTXt" + body + bytes(4)
    data = png(**GOOD)
    assert text_chunks(data[:33] + chunk + data[33:])["seed"] == "1"
    assert text_chunks(data[:40]) == text_chunks(b"") == text_chunks(b"GIF89a" + data) == {}
    with pytest.raises(UserError, match=r"a\.png: has no recipe; PNG files of unclip carry one"):
        read_recipe(png(), "a.png")


def test_a_name_in_a_recipe_opens_nothing_elsewhere(redraw: Redraw, tmp_path: Path) -> None:
    IMAGES[0].save(tmp_path / "secret.png")
    made = {"operation": "vary", "images": [{"sha256": "0" * 64, "name": "../secret.png"}]}
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(**GOOD, made=json.dumps(made)))
    refused(
        "redraw",
        folder / "a.png",
        says="was made from an image whose pixels have the sha256 000000000000",
        cwd=tmp_path,
    )
