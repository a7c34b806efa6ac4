"""What is drawn and what is withheld, without HTTP or Ray."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.errors import UserError
from serve.bundle import read_head
from serve.painter import Painter, Row, Stopped, Work
from tests.models.test_cascade import DIM, make

WORK = Work(
    "generation", {"decoder_steps": 2}, 64, (Row("a fox", 1), Row("the sea", 2), Row("a tree", 3)), partial=True
)


def drawn(painter: Painter, work: Work = WORK) -> list[tuple[Any, ...]]:
    events: list[tuple[Any, ...]] = []
    painter.draw(work, events.append, lambda: False)
    return events


def head(folder: Path, bias: float, dim: int = DIM) -> str:
    """A head that gives everything the score ``bias``."""
    save_file({"weight": np.zeros((1, dim), np.float32), "bias": np.array([bias], np.float32)}, folder / "head")
    return str(folder / "head")


@pytest.mark.parametrize("what", ["prompt", "image"])
def test_what_a_head_scores_too_high_is_withheld_in_every_size(tmp_path: Path, what: str) -> None:
    judge = read_head(head(tmp_path, 0.7), DIM)
    events = drawn(Painter("k", make(), 2, {what: (judge, 0.5)}))
    assert [event[1] for event in events if event[0] == "withheld"] == [0, 1, 2]
    assert {event[2] for event in events if event[0] == "withheld"} == {f"the {what} is refused by this server's rules"}
    assert not [event for event in events if event[0] in ("image", "partial")]
    passed = drawn(Painter("k", make(), 2, {what: (judge, 0.9)}))
    assert [event[1] for event in passed if event[0] == "image"] == [0, 1, 2]


def test_a_head_of_other_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a head of this CLIP has weight"):
        read_head(head(tmp_path, 0.7, DIM + 1), DIM)


def test_smaller_images_come_first_and_stages_are_timed() -> None:
    events = drawn(Painter("k", make(), 2))
    assert [(e[0], e[1]) for e in events if e[0] in ("partial", "image")] == [
        ("partial", 0), ("partial", 1), ("image", 0), ("image", 1), ("partial", 2), ("image", 2)
    ]  # fmt: skip
    assert [event[1] for event in events if event[0] == "stage"] == ["diffusion_prior", "decoder", "upsampler_256"] * 2


def test_a_drawing_that_nobody_waits_for_stops_at_the_next_step() -> None:
    events: list[tuple[Any, ...]] = []
    with pytest.raises(Stopped):
        Painter("k", make(), 2).draw(WORK, events.append, lambda: len(events) > 3)
    assert not [event for event in events if event[0] == "image"]
