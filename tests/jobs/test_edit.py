"""``unclip edit``: what it shows is what the models make, and comes again from the same words."""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.bundles import remember_bundle
from jobs.cli import main
from jobs.drawing_words import EDITS
from models.cascade import UnCLIP
from models.pixels import from_uint8, psnr
from models.tokens import tokenize
from models.view import view
from pipeline.sampling import edits
from pipeline.sampling.edits import END_MS, FRAME_MS, GAP
from pipeline.sampling.nearest import TrainingImage
from pipeline.sampling.recipe import OPERATIONS, ImageRecipe, pixels_hash
from tests.chain import ROOT, refused
from tests.jobs.pages import commands
from tests.models.small_models import DIM, IMAGES, make, make_codec
from tests.pipeline.sampling.bundles import publish_bundle

OPTIONS: Any = {"decoder_steps": 3, "upsampler_256_steps": 2, "size": 64}
FEW = ("--set", "size=64", "--set", "decoder_steps=3", "--set", "upsampler_256_steps=2")
Edit = Callable[..., list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle of random weights, two images and a mask. "64 px" images are of 64, the decoder's 16."""
    folder = tmp_path_factory.mktemp("edit")
    store, bundle = publish_bundle(folder)
    remember_bundle(folder / "out/nano", store.url, bundle.key)
    for name, picture in zip(("cat.png", "house.png"), IMAGES, strict=True):
        picture.save(folder / name)
    mask = Image.new("RGBA", IMAGES[0].size, "black")
    mask.paste((0, 0, 0, 0), (0, 0, mask.width // 2, mask.height))
    mask.save(folder / "mask.png")
    return folder


@pytest.fixture
def edit(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Edit:
    """Runs ``unclip edit`` in this process and returns the lines it printed."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("pipeline.sampling.drawing.cores", torch.get_num_threads)

    def run(*words: object) -> list[str]:
        assert main(["edit", *map(str, words)]) == 0
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture(scope="module")
def unclip(folder: Path) -> UnCLIP:
    return UnCLIP.from_folder(folder / "bundle")


def tiles(path: str | Path, count: int, side: int = 128) -> list[np.ndarray]:
    """The first ``count`` images of a strip whose images are ``side`` px wide."""
    whole = np.asarray(Image.open(path))
    step = side + GAP
    columns = (whole.shape[1] + GAP) // step
    corners = [(i // columns * step, i % columns * step) for i in range(count)]
    return [whole[top : top + side, left : left + side] for top, left in corners]


def shown(pixels: np.ndarray | torch.Tensor) -> np.ndarray:
    """An image of 64 px as a strip shows it, every pixel as four."""
    return np.asarray(pixels).repeat(2, 0).repeat(2, 1)


def differ(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


class Cats:
    """Training images that no index holds: test_archives.py has some that one does."""

    def nearest(self, embedding: np.ndarray, n: int) -> list[TrainingImage]:
        assert embedding.shape == (1, DIM)
        own = TrainingImage(0.9, "mine", "", None, "file:///home/me/photos/001.jpg", None)
        web = [TrainingImage(0.9, f"a\ncat {i}", "CC0-1.0", None, "https://example.org", None) for i in range(n - 1)]
        return [own, *web]


def test_the_commands_of_the_page_run_as_they_stand(edit: Edit, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.edit.SIZE", 64)  # what they leave open
    monkeypatch.setattr("jobs.bundles.Bundle.training", lambda _: Cats())
    all_commands = [command for command, _ in commands((ROOT / "docs/edit.md").read_text())]
    lines = [shlex.split(command)[2:] for command in all_commands if command.startswith("unclip edit")]
    assert {words[0] for words in lines} == EDITS.keys()
    for words in lines:
        path, *names = edit(*words)
        with Image.open(folder / path) as image:
            assert image.format == ("GIF" if "way.gif" in words else "PNG")
            assert image.height == (192 if words[0] == "nearest" else 128)
            assert names[0].startswith("  1: ")
        if words[0] == "nearest":
            assert names[1] == "  2: 90.0% alike, 001.jpg, mine"
            assert names[8] == "  9: 90.0% alike, CC0-1.0, https://example.org, a cat 6"


def test_each_kind_is_an_operation_with_one_name() -> None:
    assert EDITS.keys() == OPERATIONS.keys() - {"draw"}


def test_other_names_of_kinds_and_values_mean_the_same(edit: Edit, folder: Path) -> None:
    first, *_ = edit("vary", "cat.png", "-n", 1, *FEW)
    other, *_ = edit("variations", "cat.png", "--num-images", 1, "--size", "64x64", "num_inference_steps=3", *FEW[4:])
    assert other == first


def test_a_folder_gets_single_images_with_recipes_and_a_gif_moves(edit: Edit, folder: Path) -> None:
    paths = edit("change", "cat.png", "a cat", "a dog", "-n", 2, *FEW, "-o", "single")
    assert [Image.open(folder / path).size for path in paths] == [(64, 64)] * 2
    shares = [json.loads(Image.open(folder / path).info["made"])["shares"] for path in paths]
    assert shares == [[0.0], [0.5]]
    path, *_ = edit("interpolate", "cat.png", "house.png", "-n", 3, *FEW, "-o", "way.gif")
    with Image.open(folder / path) as moving:
        assert (moving.format, moving.n_frames) == ("GIF", 4)  # type: ignore[attr-defined]
        assert json.loads(moving.info["comment"])["seed"] == "0"
    refused("edit", "reconstruct", "cat.png", "-o", "single", says="makes one strip; name a .png file", cwd=folder)


def test_a_part_is_drawn_again_where_the_mask_is_transparent(edit: Edit, folder: Path) -> None:
    path, *names = edit("inpaint", "cat.png", "mask.png", "a dog", "-n", 1, *FEW)
    whole, drawn = tiles(path, 2)
    assert names == ["  1: the image", "  2: seed 0"]
    assert differ(whole[:, 80:], drawn[:, 80:]) <= 1
    assert differ(whole[:, :48], drawn[:, :48]) > 1
    words = ("edit", "inpaint", "cat.png", "cat.png", "a dog")
    refused(*words, says="the mask is opaque in all of the square", cwd=folder)


def test_images_are_of_256_px_unless_asked_for_otherwise(edit: Edit) -> None:
    path, *_ = edit("interpolate", "cat.png", "house.png", "-n", 2, *FEW[2:])
    assert Image.open(path).size == (2 * 256 + GAP, 256)


def test_a_strip_says_how_it_was_made(edit: Edit, folder: Path) -> None:
    path, *names = edit("vary", "cat.png", "-n", 3, "--caption", "a cät", "--seed", 7, *FEW)
    assert re.fullmatch(r"out/nano/edits/vary-cat-a-cät-[0-9a-f]{10}-7\.png", path)
    text: Any = Image.open(folder / path).info
    assert text["caption"] == "a cät"
    made = json.loads(text["made"])
    assert (made["operation"], made["n"], made["strip"]) == ("vary", 3, True)
    assert made["images"] == [{"name": "cat.png", "sha256": pixels_hash(IMAGES[0])}]
    settings = json.loads(text["settings"])
    assert (settings["size"], settings["decoder_steps"], settings["decoder_sampler"]) == (64, 3, "ddim")
    assert text["seed"] == "7"
    assert [f"  {i}: {name}" for i, name in enumerate(json.loads(text["images"]), 1)] == names
    assert names == ["  1: the image", "  2: seed 7", "  3: seed 8", "  4: seed 9"]


def test_edits_that_differ_have_files_of_their_own(edit: Edit, folder: Path) -> None:
    """Another option, another image of the same name, another caption before."""
    (folder / "other").mkdir()
    IMAGES[1].save(folder / "other/cat.png")
    ways = [
        ("vary", "cat.png", "-n", 1),
        ("vary", "cat.png", "-n", 2),
        ("vary", "cat.png", "-n", 1, "--eta", 0.5),
        ("vary", "other/cat.png", "-n", 1),
        ("vary", "cat.png", "-n", 1, "--set", "upsampler_256_steps=3"),
        ("change", "cat.png", "a cat", "a dog", "-n", 2),
        ("change", "cat.png", "a house", "a dog", "-n", 2),
    ]
    paths = [edit(*words[:2], *FEW, *words[2:])[0] for words in ways]
    assert len(set(paths)) == len(ways)
    first = (folder / paths[0]).read_bytes()
    assert edit(*ways[0], *FEW)[0] == paths[0]
    assert (folder / paths[0]).read_bytes() == first


def test_variations_come_after_the_image_and_differ_by_eta(edit: Edit, unclip: UnCLIP) -> None:
    strips = {}
    for eta in (0, 1):
        path, *_ = edit("vary", "cat.png", "-n", 2, "--eta", eta, *FEW)
        strips[eta] = tiles(path, 3)
        assert np.array_equal(strips[eta][0], shown(view(IMAGES[0], 64)))
    inversion = unclip.invert(IMAGES[:1], **OPTIONS)
    expected = unclip.variations(inversion, [0, 1], 1.0, **OPTIONS)
    for tile, picture in zip(strips[1][1:], expected.image, strict=True):
        assert differ(tile, shown(picture)) <= 1
    assert not np.array_equal(strips[0][1], strips[1][1])


def test_an_interpolation_ends_at_both_reconstructions(edit: Edit) -> None:
    path, *names = edit("interpolate", "cat.png", "house.png", "-n", 5, "--seed", 3, *FEW)
    way = tiles(path, 5)
    assert Image.open(path).size == (5 * 128 + 4 * GAP, 128)
    assert names == [f"  {i + 1}: {25 * i}%" for i in range(5)]
    for picture, end in (("cat.png", way[0]), ("house.png", way[-1])):
        alone, *_ = edit("reconstruct", picture, "--seed", 3, *FEW)
        assert differ(tiles(alone, 2)[1], end) <= 1
    assert differ(way[0], way[-1]) > 1


def test_an_animation_goes_forth_and_back(edit: Edit) -> None:
    words = ("interpolate", "cat.png", "house.png", "-n", 4, *FEW)
    way = tiles(edit(*words)[0], 4)
    path = edit(*words, "--animate")[0]
    assert path.endswith(".webp")
    with Image.open(path) as moving:
        assert (moving.n_frames, moving.size, moving.info["loop"]) == (6, (128, 128), 0)  # type: ignore[attr-defined]
        about = json.loads(moving.getexif()[0x010E])
        assert json.loads(about["made"])["operation"] == "interpolate"
        times = []
        for frame, expected in enumerate([0, 1, 2, 3, 2, 1]):
            moving.seek(frame)
            assert np.array_equal(np.asarray(moving.convert("RGB")), way[expected])
            times.append(moving.info["duration"])
    assert times == [END_MS, FRAME_MS, FRAME_MS, END_MS, FRAME_MS, FRAME_MS]


def test_a_text_difference_begins_at_the_reconstruction(edit: Edit) -> None:
    words = ("change", "cat.png", "a cat", "an angry cat")
    path, *names = edit(*words, "-n", 3, "--strength", 0.3, *FEW)
    way = tiles(path, 3)
    alone, *_ = edit("reconstruct", "cat.png", *FEW)
    assert differ(way[0], tiles(alone, 2)[1]) <= 1
    assert not np.array_equal(way[0], way[2])
    assert [name.split()[-1] for name in names] == ["0", "0.15", "0.3"]


def test_the_error_of_a_reconstruction_is_that_of_its_pixels(edit: Edit) -> None:
    path, _, said = edit("reconstruct", "cat.png", *FEW)
    picture, made = (torch.tensor(tile[::2, ::2].copy()).permute(2, 0, 1)[None] for tile in tiles(path, 2))
    expected = float(psnr(from_uint8(made), from_uint8(picture)))
    assert said.startswith("  2: its reconstruction, PSNR ")
    assert f"{expected:.1f} dB at 64 px" in said
    assert " dB at 16 px" in said


def test_all_components_are_the_whole_embedding() -> None:
    unclip = replace(make(), ar_prior=None, codec=make_codec(DIM))  # so that nothing is lost
    swept = edits.make_edit(unclip, ImageRecipe("components", seed=4, options=OPTIONS), IMAGES[:1])
    *parts, whole, picture = swept.images
    assert len(parts) >= 6  # the paper's 8, in proportion to 16 components, some of which fall together
    cosines = [float(name.rpartition(" ")[2]) for name in swept.names[:-2]]
    assert cosines[-1] == 1.0
    assert min(cosines) < 0.9
    assert differ(parts[-1], whole) <= 1
    assert differ(parts[0], whole) > 1
    assert np.array_equal(picture, view(IMAGES[0], 64))


def test_priors_differ_by_their_embedding_alone(edit: Edit, unclip: UnCLIP) -> None:
    words = ("priors", "a red fox", "--seed", 2, *FEW)
    path, *names = edit(*words, "--image", "cat.png")
    compared = tiles(path, 4)
    for tile, prior in zip(compared, ("ar", "diffusion"), strict=False):  # as generate makes them
        alone = unclip.generate(["a red fox"], [2], prior=prior, **OPTIONS)
        assert differ(tile, shown(alone.image[0])) <= 1
    sampling = replace(unclip.sampling, **OPTIONS)
    tokens = tokenize(["a red fox"])
    for tile, embedding in zip(compared[2:], (unclip.clip.encode_text(tokens), unclip.embed(IMAGES[:1])), strict=True):
        alone = unclip.decode(embedding.detach(), tokens, [2], sampling)
        assert differ(tile, shown(alone.image[0])) <= 1
    assert "text embedding, cosine 1.000 to the caption" in names[2]
    assert "true image embedding, " in names[3]
    assert names[3].endswith("1.000 to the image")
    without, *names = edit(*words, "--to", "without.png")
    assert len(names) == 3
    assert all(differ(a, b) <= 1 for a, b in zip(tiles(without, 3), compared, strict=False))


def test_a_bundle_of_one_prior_compares_what_it_has(unclip: UnCLIP) -> None:
    one = replace(unclip, ar_prior=None, codec=None)
    found = edits.make_edit(one, ImageRecipe("priors", "a cat", options=OPTIONS), [])
    assert [name.partition(",")[0] for name in found.names] == ["diffusion prior", "text embedding"]


def test_progress_counts_every_step(edit: Edit, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("vary cat.png", "interpolate cat.png house.png", "components cat.png", "priors cat"):
        main(["edit", *words.split(), *FEW])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        done, total = said.partition(": ")[2].split(" steps")[0].split(" of ")
        assert done == total, said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["vary", "."], ".: cannot be read (Is a directory)"),
        (
            ["vary", "other.ico"],
            "other.ico: cannot be used (not_an_image: the bytes are not an image in a supported format",
        ),
        (["vary", "empty.png"], "empty.png: cannot be used (zero_bytes"),
        (["reconstruct", "cut.png"], "cut.png: cannot be used (truncated"),
        (["reconstruct", "big.png"], "big.png: cannot be used (too_many_pixels"),
        (["reconstruct", "cat.png", "--caption", "cat " * 80], "caption 1 has 80 tokens"),
        (["vary", "cat.png", "--eta", "1.5"], "eta 1.5 is outside 0 to 1"),
        (["vary", "cat.png", "--set", "sise=64"], "unknown sampling options ['sise']: did you mean size?"),
        (["vary", "cat.png", "--set", "decoder_sampler=dpm"], "decoder_sampler is 'dpm': images are changed by"),
        (["vary", "cat.png", "--set", "size=["], "--set size=[: [ is not YAML"),
        (["vary", "cat.png", "--to", "cat.jpg"], "--to cat.jpg: the output is a .png file"),
        (["reconstruct", "cat.png", "--to", "cat.png/x.png"], "cat.png/x.png: cannot be written (File exists)"),
        (["interpolate", "cat.png", "house.png", "-n", "1"], "n is 1: interpolate makes 2 images or more"),
        (["change", "cat.png", "a cat", "cat " * 80], "caption 2 has 80 tokens"),
        (["change", "cat.png", "a", "b", "--strength", "2"], "strength 2.0 is outside 0 to 1"),
        (["components", "cat.png", "--counts", "1,x"], "--counts 1,x: write whole numbers"),
        (["components", "cat.png", "--counts", "99"], "cannot keep 99 principal components: this codec has 4"),
        (["priors", "cat " * 80], "caption 1 has 80 tokens"),
    ],
)
def test_mistakes_are_told_in_a_line(folder: Path, edit: Edit, words: Sequence[str], says: str) -> None:
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "cat.png").read_bytes()[:200])
    Image.new("1", (9000, 9000)).save(folder / "big.png")
    Image.new("RGB", (9, 9)).save(folder / "other.ico")
    refused("edit", *words, says=says, cwd=folder)
