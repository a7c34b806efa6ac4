"""What is told of too few held-out rows, besides an evaluation and a training, which have tests of their own."""

from pathlib import Path

import pytest

from pipeline.release.pin_drift import drift_lines
from tests.pipeline.training.conftest import make_world


@pytest.mark.parametrize(("shards", "there"), [((9,), 1), ((14, 14, 14), 6)])
def test_a_drift_on_too_few_rows_is_not_told(tmp_path: Path, shards: tuple[int, ...], there: int) -> None:
    world = make_world(tmp_path, shards)
    keys = {stage: artifact.key for stage, artifact in world.inputs.items()}
    codec = world.inputs["pairs"]  # it is not opened
    (line,) = drift_lines(world.store, {}, keys, "codec", codec, codec)
    pairs = "test pair" if there == 1 else "test pairs"
    why = f"{there} {pairs}, and a figure needs 8; set source.test to 0.2 or add pairs"
    assert line == f"the drift is not known: {why}"
