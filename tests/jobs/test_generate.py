"""``unclip generate`` as a user runs it: on workers, one of which is killed."""

import shutil
from pathlib import Path

import pytest

import pipeline.sampling.generation
from jobs.bundles import remember_bundle
from jobs.cli import main
from tests.chain import done, here, unclip
from tests.pipeline.sampling.test_generation import publish_bundle


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
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list, a bundle's output folder here, and the folders that a drawing was begun for."""
    store, bundle = publish_bundle(tmp_path)
    monkeypatch.chdir(tmp_path)
    remember_bundle(Path("out"), store.url, bundle.key)
    Path("list.csv").write_text("url,caption\nhttp://a/b,a red fox\n")
    begun: list[str] = []
    draw = pipeline.sampling.generation.map_shards
    monkeypatch.setattr(
        pipeline.sampling.generation, "map_shards", lambda ctx, *rest: begun.append(ctx.key) or draw(ctx, *rest)
    )
    return begun


FEW = ("--from", "out", "--workers", "0", "--batch", "1", "--set", "decoder_steps=2", "--set", "prior_steps=2")


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
        (["--set", "size=64", "--seed", "2"], "of other prompts"),
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


def test_a_batch_is_within_a_shard_and_a_gpu_is_not_none(drawn: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (["--batch", "65"], "--batch: 65 is above 64"),
        (["--device", "cuda", "--gpus", "0"], "--gpus 0 and --device cuda exclude each other"),
    ):
        assert main(["generate", "list.csv", *FEW, "-o", "made", *words]) == 2
        assert says in capsys.readouterr().err
    assert not drawn


def test_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    below = here("generate", tmp_path / "prompts.txt", "--from", tmp_path, "--seed", "-1")
    assert (below.returncode, below.stderr) == (2, "error: --seed -1 is below 0\n")
    nowhere = here("generate", tmp_path / "prompts.txt", "--from", tmp_path)
    assert nowhere.returncode == 2
    assert "no finished bundle there" in nowhere.stderr
