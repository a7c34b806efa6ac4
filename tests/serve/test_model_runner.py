"""What is drawn and what is withheld, without HTTP or Ray."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from models.cascade import UnCLIP
from pipeline.errors import UserError
from pipeline.sampling.drawing import png_with_text
from pipeline.sampling.recipe import ImageRecipe, Row
from serve.bundle import read_head
from serve.model_runner import DrawingCancelled, ModelRunner
from serve.work import Work
from tests.models.small_models import DIM, make

OPTIONS: Any = {"decoder_steps": 2, "size": 64}
WORK = Work(ImageRecipe(side=64, options=OPTIONS), (Row("a fox", 1), Row("the sea", 2), Row("a tree", 3)), partial=True)


def drawn(runner: ModelRunner, work: Work = WORK) -> list[tuple[Any, ...]]:
    events: list[tuple[Any, ...]] = []
    runner.draw(work, events.append, lambda: False)
    return events


def head(folder: Path, bias: float, dim: int = DIM) -> str:
    """A head that gives everything the score ``bias``."""
    save_file({"weight": np.zeros((1, dim), np.float32), "bias": np.array([bias], np.float32)}, folder / "head")
    return str(folder / "head")


@pytest.mark.parametrize("what", ["prompt", "image"])
def test_what_a_head_scores_too_high_is_withheld_in_every_size(tmp_path: Path, what: str) -> None:
    judge = read_head(head(tmp_path, 0.7), DIM)
    events = drawn(ModelRunner("k", make(), 2, {what: (judge, 0.5)}))
    assert [event[1] for event in events if event[0] == "withheld"] == [0, 1, 2]
    assert {event[2] for event in events if event[0] == "withheld"} == {f"the {what} is refused by this server's rules"}
    assert not [event for event in events if event[0] in ("image", "partial")]
    passed = drawn(ModelRunner("k", make(), 2, {what: (judge, 0.9)}))
    assert [event[1] for event in passed if event[0] == "image"] == [0, 1, 2]


def test_a_head_of_other_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a head of this CLIP has weight"):
        read_head(head(tmp_path, 0.7, DIM + 1), DIM)


def test_smaller_images_come_first_and_stages_are_timed() -> None:
    events = drawn(ModelRunner("k", make(), 2))
    assert [(e[0], e[1]) for e in events if e[0] in ("partial", "image")] == [
        ("partial", 0), ("partial", 1), ("image", 0), ("image", 1), ("partial", 2), ("image", 2)
    ]  # fmt: skip
    assert [event[1] for event in events if event[0] == "stage"] == ["diffusion_prior", "decoder", "upsampler_256"] * 2


def rows_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of a method of UnCLIP has, from now on."""
    rows: list[int] = []
    method = getattr(UnCLIP, name)
    monkeypatch.setattr(UnCLIP, name, lambda self, of, *a, **b: rows.append(len(of)) or method(self, of, *a, **b))
    return rows


@pytest.mark.parametrize("kind", ["vary", "change", "interpolate"])
def test_edits_are_drawn_as_many_at_once_as_the_batch_says(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are the same images, of latents that are found once."""
    unclip = make()
    made, inverted = (rows_of(name, monkeypatch) for name in ("decode", "invert"))
    png = png_with_text(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), {})
    caption, shares = None if kind == "interpolate" else "a fox", () if kind == "vary" else (0.0, 0.5, 1.0)
    recipe = ImageRecipe(kind, caption, "the sea", n=3, seed=1, shares=shares, side=64, options=OPTIONS)
    work = Work(recipe, recipe.rows, (png,) * (2 if kind == "interpolate" else 1))
    alone, together = (
        [e[2] for e in drawn(ModelRunner("k", unclip, batch), work) if e[0] == "image"] for batch in (1, 3)
    )
    assert (made, sum(inverted)) == ([1, 1, 1, 3], 2 * len(work.images))
    for a, b in zip(alone, together, strict=True):
        pixels = [np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (a, b)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 4  # rounding; other images differ by 100


def test_a_drawing_that_nobody_waits_for_stops_at_the_next_step() -> None:
    events: list[tuple[Any, ...]] = []
    with pytest.raises(DrawingCancelled):
        ModelRunner("k", make(), 2).draw(WORK, events.append, lambda: len(events) > 3)
    assert not [event for event in events if event[0] == "image"]
