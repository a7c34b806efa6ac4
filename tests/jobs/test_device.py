"""Whatever draws uses a GPU where there is one, says what it draws on, and leaves the choice to ``--device``.

No test machine has a GPU: torch is told that there is one, and models stay on the CPU, after they were asked to go.
"""

import platform
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import jobs.generate
import pipeline.evaluate.run
import pipeline.sampling.drawing
import pipeline.sampling.generation
from jobs.bundles import find_bundle
from jobs.cli import main
from jobs.command_line import command_line
from models.cascade import UnCLIP
from pipeline.errors import UserError
from pipeline.evaluate.recipe import EvaluationRecipe
from pipeline.evaluate.stage import run_evaluation
from pipeline.graph.artifacts import Artifact
from pipeline.graph.device import choose_device
from pipeline.graph.stages import Context
from pipeline.sampling.samples import SamplesRecipe, run_samples
from pipeline.settings import GenerationSettings
from tests.chain import refused
from tests.jobs.pages import of_type

FEW = ("--set", "size=64", "--set", "decoder_steps=2", "--set", "prior_steps=2")


@pytest.fixture
def asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that bundles are opened on, on a machine with two GPUs."""
    devices: list[str] = []
    load = UnCLIP.from_folder

    def open_on(folder: Path, device: torch.device | str = "cpu") -> UnCLIP:
        devices.append(str(device))
        return load(folder)

    monkeypatch.setattr(UnCLIP, "from_folder", open_on)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
    return devices


def context(run: Path, stage: str, recipe: Any) -> Context:
    store, bundle = find_bundle(str(run)).stored()
    return Context(store, stage, 1, "d" * 64, recipe, None, {"bundle": bundle})


@pytest.mark.parametrize(
    ("device", "expected"), [((), "cuda"), (("--device", "cpu"), "cpu"), (("--device", "cuda"), "cuda")]
)
def test_sample_and_edit_draw_on_a_gpu(
    device: tuple[str, ...], expected: str, asked: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (80, 80), "red").save("red.png")
    with caplog.at_level("INFO", "unclip"):
        assert main(["sample", "a red fox", *FEW, *device]) == 0
        assert main(["edit", "reconstruct", "red.png", *FEW, *device]) == 0
    assert asked == [expected] * 2
    said = [message for message in caplog.messages if message.startswith("drawing on ")]
    assert len(said) == 2
    assert said[0].startswith("drawing on cuda, H100" if expected == "cuda" else "drawing on the CPU, ")


def test_the_stages_and_the_notebook_draw_on_a_gpu(
    asked: list[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sample = pipeline.sampling.drawing.make_sample
    few = {"size": 64, "decoder_steps": 2, "prior_steps": 2}
    monkeypatch.setattr(
        pipeline.sampling.drawing,
        "make_sample",
        lambda *words: make_sample(words[0], words[1], words[2], few, words[4]),
    )
    run_samples(context(run, "samples", SamplesRecipe()))

    def load(_: object, device: torch.device) -> None:
        asked.append(str(device))
        raise InterruptedError

    monkeypatch.setattr(pipeline.evaluate.run, "load_judge", load)
    with pytest.raises(InterruptedError):
        run_evaluation(context(run, "evaluation", EvaluationRecipe()))
    Path("docs").mkdir()
    monkeypatch.chdir("docs")
    exec(of_type("code")["load"], {})
    assert asked == ["cuda"] * 3


@pytest.mark.parametrize(
    ("words", "workers", "gpus", "says"),
    [
        ((), 2, 1.0, "1 GPU in each of 2 workers"),
        (("--workers", "5"), 5, 1.0, "1 GPU in each of 5 workers"),
        (("--gpus", "0.5"), 4, 0.5, "0.5 GPU in each of 4 workers"),
        (("--workers", "0"), 0, 1.0, "1 GPU"),
        (("--device", "cpu"), 2, 0.0, "one core of the CPU in each of 2 workers"),
        (("--gpus", "0", "--workers", "1"), 1, 0.0, "one core of the CPU in each of 1 worker"),
    ],
)
def test_generate_gives_each_worker_a_gpu(
    words: tuple[str, ...],
    workers: int,
    gpus: float,
    says: str,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given: list[tuple[GenerationSettings, str]] = []

    def work(ctx: Context, _: object, make: pipeline.sampling.generation.MakeGenerator, *__: object) -> Artifact:
        given.append((ctx.settings, make.device))
        make()
        raise InterruptedError

    monkeypatch.setattr(pipeline.sampling.generation, "map_shards", work)
    Path("list.txt").write_text("a red fox\n")
    with caplog.at_level("INFO", "unclip"), pytest.raises(InterruptedError):
        jobs.generate.main(command_line().parse_args(["generate", "list.txt", *words]))
    device = "cuda" if gpus else "cpu"
    assert given == [(GenerationSettings(workers=workers, gpus=gpus), device)]
    assert asked == [device]
    assert f"drawing on {says}" in caplog.messages


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("sample", "a red fox", "--device", "cuda"), "device cuda: torch finds no GPU here; use auto or cpu"),
        (("edit", "priors", "a red fox", "--device", "cuda"), "device cuda: torch finds no GPU here; use auto or cpu"),
        (("generate", "list.txt", "--device", "cuda"), "--device cuda: no GPU was found"),
        (("generate", "list.txt", "--device", "cuda", "--gpus", "0"), "--gpus 0 and --device cuda exclude each other"),
        (("generate", "list.txt", "--device", "cpu", "--gpus", "1"), "--gpus 1 and --device cpu exclude each other"),
        (("generate", "list.txt", "--workers", "0", "--gpus", "1"), "device cuda: torch finds no GPU here"),
    ],
)
def test_a_gpu_that_is_not_there_is_a_line(words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("list.txt").write_text("a red fox\n")
    refused(*words, says=f"error: {says}", cwd=Path())


def test_a_device_that_there_is_not_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="device gpu: unknown; use auto, cpu or cuda"):
        choose_device("gpu")
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="device cuda:2: GPUs are numbered from 0, and torch finds 2 here"):
        choose_device("cuda:2")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are not told")
def test_memory_that_a_step_frees_serves_the_next_one() -> None:
    """Without it, the kernel takes the pages back and hands them out again, zeroed, fault by fault."""
    code = """
    import resource, torch
    from pipeline.graph.device import keep_freed_memory

    def faults():
        torch.ones(4 << 20)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(4 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    left = faults()
    keep_freed_memory()
    print(left, faults())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    left, kept = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert kept < 100 < left
