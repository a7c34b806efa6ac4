"""The whole chain as a user runs it: appended to, changed, continued. On S3: test_security.py."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load

from models.folder import load_model
from models.sampling_config import MODELS
from pipeline.config import load_config
from pipeline.store.records import read_blob
from tests.chain import ROOT, done, here, open_at, shard_paths, unclip, write_config, write_list
from tests.faults import artifact


class Chain:
    """A finished micro chain in a folder."""

    def __init__(self, folder: Path, pictures: str):
        self.folder, self.pictures = folder, pictures
        self.list = write_list(folder / "list.csv", 0, 40)
        self.store = folder / "store"
        self.config = write_config(folder, str(self.store), pictures, [self.list])
        self.output = done(here("run", self.config))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, pictures: str) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"), pictures)


def _states(output: str) -> dict[str, str]:
    """Stage to state, of a printed plan."""
    lines = [line.split() for line in output.splitlines() if line.startswith("  ")]
    return {words[0]: words[1] for words in lines if len(words) > 2 and words[1] in ("fresh", "pinned", "stale")}


def test_it_ends_with_a_picture_and_a_report(chain: Chain) -> None:
    with Image.open(chain.folder / "out/samples/0000.png") as picture:
        assert picture.size == (1024, 1024)
        assert picture.text["caption"] == "a red heart"  # type: ignore[attr-defined]
        assert json.loads(picture.text["settings"])["decoder_steps"] == 2  # type: ignore[attr-defined]
    assert "samples" in (chain.folder / "out/report.html").read_text()
    assert all(f"\n{stage} " in chain.output for stage in ("pairs", "clip", "decoder", "samples", "evaluation"))
    assert re.search(
        r"^Does it learn\? \d+ of \d+ claims hold on held-out rows, \d+ not measured", chain.output, re.MULTILINE
    )
    large = "2 test pairs with an image of 1024 px, and a figure needs 8; set source.test to 0.2 or add pairs"
    assert f"bicubic interpolation: {large}\n" in chain.output
    assert "Every model uses its condition: shuffling conditions raises its loss" in chain.output
    assert 'id="evaluation"' in (chain.folder / "out/report.html").read_text()


def test_the_images_of_a_run_come_again_from_their_recipes(chain: Chain) -> None:
    for name in ("0000.png", "0000-64.png"):
        said = done(here("redraw", chain.folder / "out/samples" / name, "--from", chain.folder / "out"))
        assert said.splitlines()[1:] == ["  the same pixels"]


def test_again_there_is_nothing_to_do_and_nothing_heavy_is_imported(chain: Chain) -> None:
    code = (
        "import sys; from jobs.cli import main; assert main(sys.argv[1:]) == 0;"
        "heavy = {'ray', 'torch', 'img2dataset', 'open_clip'} & set(sys.modules); assert not heavy, heavy"
    )
    again = subprocess.run(
        [sys.executable, "-c", code, "run", str(chain.config)], cwd=ROOT, capture_output=True, text=True
    )
    assert "nothing to do" in done(again)


def test_same_seed_same_picture(chain: Chain) -> None:
    words = ("sample", "a red heart", "a green apple", "--from", chain.folder / "out", "--set", "prior=ar", "size=64")
    first = [Path(line).read_bytes() for line in done(unclip(*words)).splitlines()]
    again = [Path(line).read_bytes() for line in done(here(*words)).splitlines()]
    other = Path(done(here(*words[:2], *words[3:], "--seed", 5)).strip()).read_bytes()
    assert len(first) == 2
    assert first == again
    assert other not in first
    default = Path(done(here("sample", "a red heart", "--from", chain.folder / "out")).strip())
    drawn, by_stage = Image.open(default), Image.open(chain.folder / "out/samples/0000.png")
    assert drawn.tobytes() == by_stage.tobytes()  # the files differ in the recipe that they carry


def test_fine_tuning_goes_on_from_a_bundle(chain: Chain, tmp_path: Path) -> None:
    """As init writes it, for all models but the priors. With a rate of nearly nothing they stay what they were."""
    pairs = write_list(tmp_path / "flags.csv", 60, 84)
    done(here("init", "my-flags", pairs, "--from", os.path.relpath(chain.folder / "out", tmp_path), cwd=tmp_path))
    config = load_config(tmp_path / "my-flags.yaml")
    (bundle,) = (chain.folder / "out/bundle").iterdir()
    assert config.clip.weights == f"local-dir:{bundle / 'clip'}"  # found from everywhere
    assert config.bundle.models == MODELS[1:]
    assert config.diffusion_prior.init_from is None
    for name in MODELS[2:]:
        recipe, weights = getattr(config, name), bundle / name / "model.safetensors"
        assert recipe.model == load_model(bundle / name).config
        assert recipe.init_from == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert recipe.samples % recipe.batch == 0
    still = {"samples": 128, "learning_rate": 1e-9, "warmup_steps": 0, "ema_half_life": 0}
    words = [f"decoder.{name}={value}" for name, value in still.items()]
    words += [f"run.{stage}.workers=0" for stage in ("pairs", "embeddings", "thresholds", "curation")]
    words += [f"run.pairs.hosts={{drawings.test: '{chain.pictures}'}}", "--until", "decoder"]
    done(here("run", "my-flags.yaml", *words, cwd=tmp_path))
    store = open_at(tmp_path / "out/my-flags/store")
    tuned = load(read_blob(store, artifact(store, "decoder").blobs["model.safetensors"]))
    for name, tensor in load_model(bundle / "decoder").state_dict().items():
        assert (tuned[name] - tensor).abs().max() < 1e-6


def test_appending_fetches_and_embeds_only_the_new_rows(chain: Chain, tmp_path: Path) -> None:
    more = write_list(tmp_path / "more.csv", 60, 66)
    config = write_config(tmp_path, str(chain.store), chain.pictures, [chain.list, more])
    store = open_at(chain.store)
    before = {stage: shard_paths(store, stage) for stage in ("pairs", "embeddings", "curation")}
    output = done(here("run", config, "--until", "codec"))
    assert _states(output) == {
        "source": "stale", "captions": "stale", "pairs": "stale", "filter": "stale", "clip": "pinned",
        "embeddings": "stale", "curation": "stale", "codec": "pinned",
    }  # fmt: skip
    for stage, paths in before.items():
        assert paths < shard_paths(store, stage)
        assert len(shard_paths(store, stage)) == len(paths) + 1
    assert "6 of 46 rows" not in output  # progress counts what was there
    table = [line.split()[:2] for line in output.splitlines() if line.startswith(("pairs  ", "embeddings  "))]
    assert table == [["pairs", "46"], ["embeddings", "46"]]
    # The report shows what is pinned, too, and then nothing is written again.
    assert "nothing to do" in done(here("run", config, "--until", "codec"))
    written = (tmp_path / "out/report.html").stat().st_mtime_ns
    assert "nothing to do" in done(here("run", config, "--until", "codec"))
    assert (tmp_path / "out/report.html").stat().st_mtime_ns == written


def test_what_another_configuration_has_left_in_the_folder_is_replaced(chain: Chain) -> None:
    """Where nothing is to do, and where only the evaluation is."""
    output = chain.folder / "out"
    bundle, page = (output / "bundle.json").read_text(), (output / "report.json").read_text()
    for words in ((), ("evaluation.rows=9",)):
        (output / "bundle.json").write_text(json.dumps(json.loads(bundle) | {"bundle": "0" * 64}))
        shutil.rmtree(output / "samples")
        (output / "samples").mkdir()
        for name in ("0007.png", "0007-64.png", "a-red-heart-0123456789-0.png"):
            (output / "samples" / name).touch()
        assert ("nothing to do" in done(here("run", chain.config, *words))) == (not words)
        assert not list((output / "samples").glob("0007*"))
        assert (output / "samples/a-red-heart-0123456789-0.png").exists()
        assert (output / "bundle.json").read_text() == bundle
        assert (output / "samples/0000.png").exists()
        report = (output / "report.html").read_text()
        assert 'href="samples/0000.png"' in report
        assert f"unclip sample --from {output} " in report
    done(here("run", chain.config))  # the report of the other evaluation stands there
    written = (output / "report.html").stat().st_mtime_ns
    done(here("run", chain.config))
    assert (output / "report.html").stat().st_mtime_ns == written  # it shows what it should
    now = (output / "report.json").read_text()
    old, new = ([stage["key"] for stage in json.loads(text)["stages"]] for text in (page, now))
    assert old == new
