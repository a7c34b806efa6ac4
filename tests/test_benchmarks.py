"""Every benchmark runs to its end at small sizes. What it finds there means nothing and is not looked at."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from benchmarks.billion import PARTS as OF_A_BILLION
from benchmarks.billion import read
from benchmarks.fake_web import fetch_web
from benchmarks.gpu.bench import Bench, Outcome
from benchmarks.gpu.run import cosines
from benchmarks.gpu_check import PARTS
from benchmarks.gpu_check import main as check_gpu
from benchmarks.simulation import Simulation
from benchmarks.timing import ratio
from pipeline.build import build
from pipeline.config import preset_config
from pipeline.cost.observed import read_profile
from tests.models.small_models import make

ROOT = Path(__file__).parents[1]
RELEASE = re.search(r"^BENCHMARKS := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
assert RELEASE
SLOW = RELEASE[1].replace("\\\n", "").split()  # what make bench runs: up to half a minute each


@pytest.mark.slow
@pytest.mark.parametrize("name", ["house", *SLOW])
def test_the_last_line_is_the_ratios(name: str) -> None:
    ratios = json.loads(ran(f"benchmarks.{name}", "--quick", "--rounds", "1").splitlines()[-1])
    assert ratios
    free = {"growth_exponent"}  # of two short runs, of which the first is slowed by imports
    assert all(math.isfinite(v) and (v > 0 or name == "house" or key in free) for key, v in ratios.items())


def ran(module: str, *words: object) -> str:
    """What a module prints that has to end well, on one thread."""
    command, environment = [sys.executable, "-m", module, *map(str, words)], os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_the_parts_of_a_billion_rows_are_measured_apart_and_then_simulated(tmp_path: Path) -> None:
    file = tmp_path / "billion.json"
    parts = OF_A_BILLION.keys() - {"plan"}  # which is a probe and a run, see jobs/test_plan.py
    for part in parts:
        assert json.loads(ran("benchmarks.billion", "--quick", "--part", part, "--to", file).splitlines()[-1])
    sizes = {f"{part} {size}" for part in parts for size in OF_A_BILLION[part][2]}
    assert read(file).keys() == sizes
    figures = json.loads(ran("benchmarks.billion", "--part", "simulation", "--to", file).splitlines()[-1])
    assert {"near_exponent", "fetch_takes_a_month_from"} < figures.keys()


def test_one_worker_gets_the_images_of_a_web_that_is_played_and_none_of_dead_hosts() -> None:
    """Of 400 rows, 20 are on dead hosts, 20 on one whose answers never end, 16 are gone and 12 are pages.

    The others answer at once.
    """
    found = fetch_web(400, speed=10.0, delay_s=0.0)
    assert found["kept"] == (400 - 20 - 20 - 16 - 12) / 400


KNOWN = {
    "web 1": {"kept": 0.9, "images_per_second": 100.0},
    "wide 1": {"nanoseconds_a_pair": 50.0, "microseconds_a_row": 200.0},
    "driver 1": {"milliseconds_a_part": 10.0, "milliseconds_a_shard": 1.0},
    "records 100": {"driver_bytes": 1e8, "start_seconds": 1.0},
    "records 1100": {"driver_bytes": 2e8, "start_seconds": 2.0},
    "passes 1000000": {"driver_bytes": 1e8, "requests_a_row": 0.02, "objects_a_row": 0.004},
    "passes 2000000": {"driver_bytes": 3e8, "requests_a_row": 0.02, "objects_a_row": 0.004},
    "near 1000": {"seconds": 1.0, "requests_a_row": 0.02, "objects_a_row": 0.004},
    "near 4000": {"seconds": 4.0, "requests_a_row": 0.021, "objects_a_row": 0.004},
}


def test_a_simulation_follows_from_what_was_measured() -> None:
    simulation = Simulation(KNOWN)
    assert simulation.growth()["near_exponent"] == pytest.approx(1.0)
    assert 4 < simulation.near_seconds(4e6) / simulation.near_seconds(1e6) < 5
    assert simulation.near_seconds(4e10) == pytest.approx(16 * simulation.near_seconds(1e10), rel=0.1)
    assert simulation.fetch_seconds(256e6) == pytest.approx(1e6 * 0.02)  # a core decodes 50 a second
    slow = Simulation(KNOWN | {"web 1": {"kept": 0.9, "images_per_second": 9.0}})
    assert slow.fetch_seconds(256e6) == pytest.approx(1e6 / 10)
    assert simulation.driver_bytes(1e7) == pytest.approx(0.9e8 + 1e3 * 1e5 + 1e7 * 200)
    assert simulation.start_seconds(1e7) == pytest.approx(1.9)
    limits = simulation.limits()
    assert list(limits.values()) == sorted(limits.values())
    assert simulation.driver_bytes(limits["tasks_fill_the_head"]) == pytest.approx(16 << 30, rel=0.01)
    with pytest.raises(SystemExit, match="--part wide"):
        Simulation({}).near_seconds(1.0)


@pytest.mark.slow  # of a profile, see pipeline/cost/test_observed; of a part that fails, below
def test_the_check_of_a_gpu_runs_on_a_cpu_and_writes_a_profile(tmp_path: Path) -> None:
    """At nano's sizes; a plan of nano takes the rates of all six models from it."""
    file = tmp_path / "check.json"
    said = ran("benchmarks.gpu_check", "--device", "cpu", "--quick", "--json", file)
    parts = {part["part"]: part["result"] for part in json.loads(file.read_text())["parts"]}
    skipped = {"waits", "peers", "several"}
    assert parts == {name: "SKIP" if name in skipped else "PASS" for name, _ in PARTS}
    *lines, last = said.splitlines()
    assert len(lines) == len(PARTS)
    assert last == f"{len(PARTS) - 3} of {len(PARTS)} passed; skipped: waits, peers, several"
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(read_profile(file, build(preset_config("nano")))) == 6


@pytest.mark.slow
def test_the_check_starts_several_processes() -> None:
    said = ran("benchmarks.gpu_check", "--device", "cpu", "--quick", "--part", 10, "--gpus", 2)
    assert "several    PASS" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_check_without_a_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_gpu([]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_a_part_that_breaks_or_finds_something_fails_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(bench: Bench) -> Outcome:
        raise RuntimeError("CUDA error: unspecified\nmore of it")

    def finds(bench: Bench) -> Outcome:
        outcome = Outcome("two figures")
        outcome.expect(False, "one is too high")
        return outcome

    parts = (("breaks", breaks), ("finds", finds), ("holds", lambda bench: Outcome("fine")))
    monkeypatch.setattr("benchmarks.gpu_check.PARTS", parts)
    assert check_gpu(["--device", "cpu"]) == 1
    lines = [line.split("(")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "1 breaks     FAIL  it broke off",
        "RuntimeError: CUDA error: unspecified",
        "2 finds      FAIL  two figures",
        "one is too high",
        "3 holds      PASS  fine",
        "1 of 3 passed; failed: breaks, finds",
    ]


def test_one_row_whose_embedding_differs_is_found() -> None:
    def table(angle: float) -> pa.Table:
        rows = [[1.0, 0.0], [math.cos(angle), math.sin(angle)], [0.0, 1.0]]
        column = pa.array(rows, pa.list_(pa.float16()))
        return pa.table({"image_embedding": column, "text_embedding": pa.array(rows[:1] * 3, pa.list_(pa.float16()))})

    assert cosines(table(0.3), table(0.3)) == pytest.approx([1.0, 1.0], abs=1e-3)
    assert cosines(table(0.3), table(0.5)) == pytest.approx([math.cos(0.2), 1.0], abs=1e-3)


def test_a_ratio_is_the_median_of_those_of_the_rounds() -> None:
    assert ratio({"a": [1.0, 9.0, 4.0], "b": [1.0, 3.0, 2.0]}, "a", "b") == 2.0  # of the medians it would be 2 as well
    assert ratio({"a": [1.0, 2.0, 8.0], "b": [4.0, 1.0, 2.0]}, "a", "b") == 2.0  # here 1


FREED = """
import torch
from benchmarks.timing import memory_of
held = torch.ones(2**24)  # 64 MiB
def step():
    for _ in range(3):
        torch.ones(2**23).add_(held[0])  # 32 MiB, freed each time
step()
print(memory_of(step))
"""


@pytest.mark.slow  # one process that imports torch
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_counts_what_is_freed_again_and_not_what_was_there() -> None:
    """In a fresh process, as benchmarks measure: an old one's allocator may have room that it gives back to nobody."""
    said = subprocess.run([sys.executable, "-c", FREED], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 0.9 * 2**25 < int(said) < 1.6 * 2**25


@pytest.mark.slow
def test_serving_is_compared_with_the_bare_models(tmp_path: Path) -> None:
    make().save(tmp_path / "tiny")
    said = ran("benchmarks.serving", "--quick", "--size", 64, "--from", tmp_path / "tiny")
    found = json.loads(said.splitlines()[-1])
    assert list(found.pop("first")) == ["16x16", "64x64", "256x256"]
    assert found.keys() == {"bare", "one client", "eight clients"}
    assert all(rate > 0 for rate in found.values())
