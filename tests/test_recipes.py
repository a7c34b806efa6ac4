"""Trials of recipes: the budget, the figures, the record, and one of each model from a list to its line."""

import csv
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pipeline.evaluate.captions import Phrases
from torch import Tensor

from benchmarks.recipes import trial as trials
from benchmarks.recipes.__main__ import main
from benchmarks.recipes.figures import PATCH, QUARTERS, dots, errors, other_style
from benchmarks.recipes.others import reworded
from benchmarks.recipes.record import LOG, PAGE, cell, check_new, page, read_log, table
from benchmarks.recipes.trial import Trial, describe, read_trial, train
from models.diffusion.process import Prediction
from models.draw import Draw
from models.image_configs import DecoderConfig
from pipeline.errors import UserError
from pipeline.training.loop import NonFinite
from pipeline.training.recipes import DecoderRecipe, TrainingRecipe
from pipeline.training.state import learning_rate
from tests.chain import MICRO, ROOT

PHRASES = Phrases(("a drawing of", "a photo of"), {"": (255, 255, 255), "on a red background": (200, 0, 0)})
TRIAL = Trial("one", "Smaller batches lower the error.", "decoder", "configs/nano.yaml", 100.0)
RECIPE = DecoderRecipe(samples=64, batch=8, lanes=8, learning_rate=1.0)
LINE = describe(TRIAL, {}) | {"seed": 0, "samples": 80, "diverged": False, "figures": {"x0_error_1": [0.5, 0.4, 0.7]}}


# --- the budget -------------------------------------------------------------------------------------------------------


class Clock:
    """A training whose every step takes a second, and the clock that it is measured by."""

    def __init__(self, diverges_at: int = 0) -> None:
        self.now, self.samples, self.rates = 0.0, 0, []
        self.diverges_at, self.failed = diverges_at, torch.zeros(())

    def __call__(self) -> float:
        return self.now

    def go_on(self, recipe: TrainingRecipe, between: Callable[[Any], None]) -> None:
        while True:
            between(self)
            if self.samples >= recipe.samples:
                return
            self.now, self.samples = self.now + 1, self.samples + recipe.batch
            self.rates.append(learning_rate(recipe, self.samples))
            if self.samples == self.diverges_at:
                self.failed = torch.ones(())


@pytest.mark.parametrize(("decay", "full"), [(0.0, 100), (0.3, 70), (0.5, 50)])
def test_the_budget_is_spent_and_the_rate_falls_over_its_share(
    monkeypatch: pytest.MonkeyPatch, decay: float, full: int
) -> None:
    clock = Clock()
    monkeypatch.setattr(trials, "process_time", clock)
    train(replace(TRIAL, decay=decay), RECIPE, clock.go_on, clock)  # type: ignore[arg-type]
    falling = [1 - i / (100 - full) for i in range(100 - full)]
    assert clock.rates == pytest.approx([1.0] * full + falling)
    assert clock.samples == 800


def test_a_training_that_diverged_in_its_last_steps_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(diverges_at=8 * 99)
    monkeypatch.setattr(trials, "process_time", clock)
    with pytest.raises(NonFinite, match="before sample 800"):
        train(TRIAL, RECIPE, clock.go_on, clock)  # type: ignore[arg-type]


# --- the description --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hypothesis": None}, "hypothesis: missing"),
        ({"hypothesis": "better"}, "hypothesis: "),
        ({"overides": []}, "did you mean overrides"),
        ({"overrides": ["decoder.samples=100"]}, "decoder.samples follows from the budget"),
        ({"crops": 0.5}, "crops and captions are for CLIP"),
        ({"decay": 1.0}, "decay: "),
    ],
)
def test_mistakes_in_a_trial_are_said_in_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    fields = dataclasses.asdict(TRIAL) | changes
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in fields.items() if v not in (None, ()) and k != "name"}))
    with pytest.raises(UserError, match=said) as raised:
        read_trial(str(file))
    assert "\n" not in str(raised.value)


def test_the_trials_that_are_there_can_be_read() -> None:
    files = sorted(LOG.parent.rglob("*.yaml"))
    assert {read_trial(str(file)).name for file in files} >= {"judge", "clip-demo", "decoder-demo"}
    assert len({file.stem for file in files}) == len(files)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_dots_are_the_spread_within_patches_at_a_level_border() -> None:
    real = torch.full((2, 16, 16, 3), 200, dtype=torch.uint8)
    drawn = real.clone()
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    board = torch.where((y + x) % 2 == 0, 10, -10)[..., None]
    drawn[0] = (drawn[0].int() + board).to(torch.uint8)
    drawn[1, 4:12, 4:12] = 0  # not at the border
    assert dots(drawn, real).tolist() == pytest.approx([10 / 255, 0.0])
    real[0, :PATCH, :, 0] += board[:PATCH, :, 0].to(torch.uint8)  # these four patches are not level
    drawn[0, :PATCH] = 0
    drawn[0, :PATCH, ::2] = 255
    assert dots(drawn, real).tolist() == pytest.approx([10 / 255, 0.0])
    assert dots(drawn, torch.randint(0, 256, real.shape, dtype=torch.uint8)).tolist() == [0.0, 0.0]


def test_errors_are_those_of_x0_in_each_quarter_of_the_timesteps() -> None:
    config, times = DecoderConfig(steps=40), []
    x0 = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        times.append(t)
        return Prediction(x0 + t.view(-1, 1, 1, 1), x_t)

    found = errors(denoise, x0, config, Draw([(3, 5)]))
    assert found.shape == (5, QUARTERS)
    assert torch.allclose(found, torch.stack(times, dim=1).float() ** 2)
    assert [set((t // 10).tolist()) for t in times] == [{0}, {1}, {2}, {3}]


def test_ranks_in_the_other_style_are_those_of_a_plain_search() -> None:
    g = np.random.default_rng(0)
    rows, vectors = [], g.normal(size=(60, 6))
    for i in range(60):
        style = PHRASES.styles[i % 2]
        rows.append((f"{style} thing {i // 2 % 25}", i % 3 == 0))  # the last ten things again
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = []
    for i, (text, asks) in enumerate(rows):
        style, name = PHRASES.parts(text)[:2]  # type: ignore[index]
        if asks:
            others = [j for j, (other, _) in enumerate(rows) if PHRASES.parts(other)[0] != style]  # type: ignore[index]
            own = next(j for j in others if PHRASES.parts(rows[j][0])[1] == name)  # type: ignore[index]
            expected.append(1 + sum(unit[i] @ unit[j] > unit[i] @ unit[own] for j in others))
    found = other_style(torch.from_numpy(vectors), rows, PHRASES)
    assert found["other_style_first_10"][0] == pytest.approx(np.mean(np.array(expected) <= 10))
    value, low, high = found["other_style_rank"]
    assert value == sorted(expected)[(len(expected) - 1) // 2]
    assert low <= value <= high
    assert other_style(torch.from_numpy(vectors), [(text, False) for text, _ in rows], PHRASES) == {}


def test_a_reworded_caption_always_names_the_thing() -> None:
    caption = "a drawing of a cat on a red background"
    found = [reworded(caption, PHRASES, seed) for seed in range(400)]
    parts = [frozenset(text.split(", ")) for text in found]
    assert set(parts) == {
        frozenset(chosen)
        for chosen in (
            ["a cat"],
            ["a cat", "a drawing"],
            ["a cat", "on a red background"],
            ["a cat", "a drawing", "on a red background"],
        )
    }
    assert len(set(found)) == 1 + 2 + 2 + 6  # every order
    assert 60 < sum(part == {"a cat"} for part in parts) < 140
    assert found == [reworded(caption, PHRASES, seed) for seed in range(400)]
    assert reworded("something else", PHRASES, 0) == "something else"


# --- the record -------------------------------------------------------------------------------------------------------


def test_the_page_has_the_tables_of_the_record() -> None:
    text = PAGE.read_text()
    assert text == page(text, read_log(LOG)), "python -m benchmarks.recipes --table writes the tables"
    assert text.count("<!-- trials of ") == 4


def test_a_row_has_the_interval_of_one_seed_or_the_range_of_several() -> None:
    other = LINE | {"seed": 1, "samples": 120, "figures": {"x0_error_1": [0.7, 0.1, 0.9]}}
    assert cell([LINE], "x0_error_1", 2) == "0.50 (0.40 to 0.70)"
    assert cell([LINE, other], "x0_error_1", 2) == "0.60 (0.50 to 0.70)"
    assert cell([LINE | {"diverged": True, "figures": {}}], "x0_error_1", 2) == "diverged"
    assert cell([LINE], "image_dots", 4) == ""
    failed = LINE | {"name": "two", "diverged": True, "figures": {}}
    head, _, first, second = table("decoder", [LINE, other, failed]).splitlines()
    assert head == "| trial | hypothesis | CPU s | seeds | samples | error 1 |"
    assert first == "| `one` | Smaller batches lower the error. | 100 | 2 | 100 | 0.6000 (0.5000 to 0.7000) |"
    assert second.endswith("| diverged |")
    assert table("clip", [LINE]) == ""


def test_a_name_stands_for_one_trial_and_a_seed_runs_once() -> None:
    check_new([LINE], describe(TRIAL, {}), 1)
    check_new([LINE], describe(replace(TRIAL, name="two", seconds=5.0), {}), 0)
    with pytest.raises(UserError, match="one: the record has it with seed 0"):
        check_new([LINE], describe(TRIAL, {}), 0)
    with pytest.raises(UserError, match="one: the record has it with another seconds"):
        check_new([LINE], describe(replace(TRIAL, seconds=5.0), {}), 1)
    with pytest.raises(UserError, match="another partners"):
        check_new([LINE], describe(TRIAL, {"prior": "out/prior"}), 1)
    with pytest.raises(UserError, match="--decoder: a trial of decoder does not need it"):
        describe(TRIAL, {"decoder": "out/decoder"})


# --- from a list to a line --------------------------------------------------------------------------------------------

SPLITS = ("train", "train", "train", "validation", "train", "train", "train", "test")
COMMANDS = (
    "judge --save judge --held-out",
    "clip --save clip",
    "diffusion_prior --save prior",
    "ar_prior --save ar",
    "decoder --judge judge --prior prior --held-out",
    "decoder --judge judge --prior prior --seed 1",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which trials of every kind have run, each in less than a second of training."""
    folder = tmp_path_factory.mktemp("recipes")
    g = np.random.default_rng(0)
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("url", "caption", "split"))
        for i in range(128):
            Image.fromarray(g.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            thing, style = divmod(i, 2)
            split = SPLITS[thing % 8]
            if split == "validation" and style == 0:
                split = "train"  # validation images are of things that training shows in the other style
            end = " on a red background" if thing % 2 else ""
            writer.writerow((f"file://{folder}/{i}.png", f"{PHRASES.styles[style]} thing {thing}{end}", split))
    phrases = {"styles": list(PHRASES.styles), "backgrounds": {k: list(v) for k, v in PHRASES.backgrounds.items()}}
    config = {
        "project": "recipes",
        "preset": "nano",
        "store": "nowhere",
        "source": {"paths": [str(folder / "list.csv")], "shard_rows": 64},
        "bundle": {"sampling": MICRO["bundle"]["sampling"]},  # type: ignore[index]
        "evaluation": {"phrases": phrases},
        "clip": {"samples": 64, "batch": 32},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    clip = f"clip.weights=local-dir:{folder}/clip"
    for name, changes in {
        "judge": {"stage": "clip", "crops": 0.5, "captions": "parts"},
        "clip": {"stage": "clip", "decay": 0.5},
        "diffusion_prior": {"overrides": [clip, "diffusion_prior.batch=8"]},
        "ar_prior": {"overrides": [clip, "ar_prior.batch=8"]},
        "decoder": {"overrides": [clip, "decoder.batch=8"], "decay": 0.5},
    }.items():
        fields = {"hypothesis": "It runs to its end, and says something.", "stage": name, "seconds": 0.4}
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump(fields | {"config": str(folder / "config.yaml")} | changes)  # type: ignore[operator]
        )
    code = (
        "import sys; from benchmarks.recipes.__main__ import main\n"
        "for line in sys.stdin: assert main(line.split()) == 0\n"
        "assert 'ray' not in sys.modules\n"
    )
    lines = [f"{c.split()[0]}.yaml {' '.join(c.split()[1:])} --store store --log log.jsonl\n" for c in COMMANDS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, input="".join(lines), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def test_every_model_gets_its_line(folder: Path) -> None:
    lines = read_log(folder / "log.jsonl")
    assert [(line["name"], line["seed"]) for line in lines] == [
        ("judge", 0), ("clip", 0), ("diffusion_prior", 0), ("ar_prior", 0), ("decoder", 0), ("decoder", 1),
    ]  # fmt: skip
    for line in lines:
        assert line["samples"] > 0
        assert line["took"] > 0
        assert not line["diverged"]
        for name, (value, low, high) in line["figures"].items():
            assert low <= value <= high or name.endswith("rank"), name
    judge, clip, diffusion, ar, decoder, again = (line["figures"] for line in lines)
    assert clip.keys() == {"r_precision", "name_alone", "within_style", "other_style_rank", "other_style_first_10"}
    assert judge.keys() == clip.keys() | {f"held_out_{name}" for name in clip}
    errors = {f"x0_error_{i}" for i in range(1, 5)}
    drawn = {"embedding_cosine", "embedding_first_10", "variance_ratio"}
    assert diffusion.keys() == errors | drawn
    assert ar.keys() == {"nats"} | drawn
    seen = {f"{source}_{name}" for source in ("image", "caption") for name in ("first_10", "cosine", "background")}
    assert again.keys() == errors | seen | {"image_dots"}
    assert decoder.keys() == again.keys() | {f"held_out_{name}" for name in again}
    assert decoder["image_dots"] == [0.0, 0.0, 0.0]  # no patch of these images is level
    assert lines[4]["partners"] == {"judge": "judge", "prior": "prior"}
    assert decoder != again


def test_a_trial_that_is_in_the_record_is_refused_before_it_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    record = (folder / "log.jsonl").read_text()
    with pytest.raises(UserError, match="clip: the record has it with seed 0; take another --seed"):
        main(["clip.yaml", "--store", "store", "--log", "log.jsonl"])
    with pytest.raises(UserError, match="clip is not empty: name a new folder for the model"):
        main(["clip.yaml", "--store", "store", "--log", "log.jsonl", "--save", "clip", "--seed", "1"])
    assert (folder / "log.jsonl").read_text() == record
