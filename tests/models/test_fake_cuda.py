"""Every loss and sampler, CLIP and the loop of a training on a CUDA device that is not there (see fake_cuda)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.fake_cuda.cases import COMPILED, FAULTS, FIT, LARGE, SAMPLERS, STEPS

pytestmark = [
    pytest.mark.integration,  # with a compiler, which takes a minute
    pytest.mark.skipif(
        torch.version.cuda is not None or shutil.which("g++") is None, reason="needs a CPU build of torch, and g++"
    ),
]
QUICK = (*STEPS, *SAMPLERS, FIT, *FAULTS)
# What still asks the device at every step. Entries go, and none is added.
ASKS = {
    "sampler: decoder, guided in an interval": "models/decoder.py",
    "sampler: upsampler_256, a network for the last step": "models/upsampler.py",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fake_cuda") / "device.so"


def run(library: Path, *names: str) -> dict[str, Any]:
    """Returns what is found of cases, in a process of its own."""
    command = [sys.executable, "-m", "tests.models.fake_cuda", str(library), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found(library: Path) -> dict[str, Any]:
    return run(library, *QUICK)


@pytest.mark.parametrize("name", [name for name in QUICK if name not in FAULTS])
def test_devices_do_not_mix_and_no_step_waits(name: str, found: dict[str, Any]) -> None:
    """Of a step after the first: no blocking copy, and no value that Python asks for. Cases check dtypes themselves."""
    assert "error" not in found[name], found[name]["error"]
    assert found[name]["kernels"] > 0
    assert found[name]["copies"] == {}
    asked = {place.split(":")[0] for place in found[name]["asked"]}
    assert asked == ({ASKS[name]} if name in ASKS else set())


def test_what_is_looked_for_would_be_found(found: dict[str, Any]) -> None:
    assert "found at least two devices" in found["fault: devices mix"]["error"]
    assert sum(found["fault: a blocking copy"]["copies"].values()) == 1
    assert sum(found["fault: a question"]["asked"].values()) == 1


@pytest.mark.slow
def test_a_step_of_the_small_decoder_has_few_kernels(library: Path) -> None:
    """It had 3,002, more than a third of them casts."""
    [count] = run(library, *LARGE).values()
    assert count["kernels"] <= 2100
    assert count["copies"] == count["asked"] == {}


@pytest.mark.slow
def test_every_network_is_one_graph_for_a_compiler(library: Path) -> None:
    errors = {name: result.get("error") for name, result in run(library, *COMPILED).items()}
    assert errors == dict.fromkeys(COMPILED)
