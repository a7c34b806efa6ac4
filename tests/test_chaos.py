"""The first two slices of chaos, and that slices which are done are not done again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chain import ROOT


@pytest.mark.slow
def test_two_slices_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos", "--slices", "2", "--folder", str(tmp_path)]
    outputs = []
    for _ in range(2):
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        outputs.append(run.stdout)
    found = json.loads(outputs[0].splitlines()[-1])
    assert found == {"slices": 2, "of": 2, "failed": [], "faults": {"kill worker": 1, "kill driver": 1}}
    assert outputs[0] == outputs[1]
    assert len((tmp_path / "data-seed-1/slices.jsonl").read_text().splitlines()) == 2
