"""``unclip generate`` as a user runs it: on workers, one of which is killed."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.bundles import remember_bundle
from jobs.cli import main
from pipeline.sampling import generation
from pipeline.sampling.recipe import read_recipe
from tests.chain import done, refused, unclip
from tests.pipeline.sampling.bundles import publish_bundle


@pytest.mark.slow
def test_a_worker_that_dies_costs_no_image(tmp_path: Path) -> None:
    """Three shards on one worker, killed before its first record, and in this process: the same files."""
    _, bundle = publish_bundle(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"image {i}\n" for i in range(130)))
    shutil.copytree(tmp_path / "store", tmp_path / "other")
    outputs = []
    for store, workers in (("store", 1), ("other", 0)):
        out = tmp_path / f"out-{workers}"
        remember_bundle(out, str(tmp_path / store), bundle.key)
        words = ("generate", prompts, "--from", out, "--workers", workers, "--batch", 16)
        options = ("--set", "size=64", "--set", "decoder_steps=2", "--set", "prior_steps=2")
        crash = {"UNCLIP_CRASH": f"shard.before_record@{tmp_path / 'killed'}"} if workers else {}
        ended = unclip(*words, *options, env=crash)
        said = done(ended)
        assert "logging.cc" not in ended.stderr  # Ray's, about itself
        assert "generation: 130 of 130" in ended.stderr
        assert "130 images, " in said
        assert f"3 tars, each with a table of seeds and scores: {out}/generated" in said
        outputs.append({path.name: path.read_bytes() for path in (out / "generated").iterdir()})
    assert (tmp_path / "killed").exists()
    assert len(outputs[0]) == 2 * 3 + 1
    assert outputs[0] == outputs[1]


@pytest.fixture
def drawn(run: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list, a bundle's output folder here, and the folders that a drawing was begun for."""
    Path("list.csv").write_text("url,caption\nhttp://a/b,a red fox\n")
    begun: list[str] = []
    draw = generation.map_shards
    monkeypatch.setattr(generation, "map_shards", lambda ctx, *rest: begun.append(ctx.key) or draw(ctx, *rest))
    return begun


FEW = ("--workers", "0", "--batch", "1", "--set", "decoder_steps=2", "--set", "prior_steps=2")


def test_a_folder_of_other_images_is_refused_before_drawing(
    drawn: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "list.csv", *FEW, "-o", "made"]
    assert main([*words, "--set", "size=64"]) == 0
    assert "prompts: column caption of list.csv\n1 image, " in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in Path("made").iterdir()}
    for change, says in (
        (["--set", "size=256"], "of other options"),
        (["--set", "size=64", "--batch", "2"], "of other batch"),
        (["--set", "size=64", "--seed", "2"], "of other seeds"),
        (["--set", "size=64", "--column", "url"], "of other prompts"),
    ):
        assert main([*words, *change]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error == f"error: made holds images {says}; name another folder with --to, or delete it"
    Path("made/settings.json").unlink()
    assert main([*words, "--set", "size=64"]) == 2
    assert "made holds images without a settings.json" in capsys.readouterr().err
    assert len(drawn) == 1
    before.pop("settings.json")
    assert {path.name: path.read_bytes() for path in Path("made").iterdir()} == before


def test_single_files_carry_recipes_that_draw_them_again(drawn: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "list.csv", *FEW, "--set", "size=64", "--seed", "7", "-o", "made", "--png"]
    assert main(words) == 0
    assert capsys.readouterr().out.endswith("1 PNG, each with its recipe: made/png\n")
    [file] = Path("made/png").iterdir()
    assert file.name == "0000000000-a-red-fox.png"
    with tarfile.open("made/00000.tar") as tar:
        stored = tar.extractfile("0000000000.png")
        assert stored
        assert (np.asarray(Image.open(file)) == np.asarray(Image.open(stored))).all()
    recipe = read_recipe(file.read_bytes(), file.name)
    assert (recipe.caption, recipe.seed, recipe.options["size"]) == ("a red fox", 7, 64)
    assert main(["redraw", str(file)]) == 0
    said = capsys.readouterr().out.splitlines()[1]
    assert said == "  the same pixels" or "by 1 of 255" in said  # it was drawn on one thread


def test_mistakes_are_told_in_a_line_before_drawing(drawn: list[str]) -> None:
    words = ("generate", "list.csv")
    refused(*words, "--batch", "65", says="--batch: 65 is above 64", cwd=Path())
    refused(*words, "--seed", "-1", says="seed -1 is below 0", cwd=Path())
    refused(*words, "--from", ".", says="no finished bundle there", cwd=Path())
    assert not drawn
