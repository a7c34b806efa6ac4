"""The walks of docs/architecture.md name code that is there, in the order in which it runs."""

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from pipeline.training.recipes import DecoderRecipe
from pipeline.training.stage import train
from tests.chain import ROOT
from tests.models.small_models import make
from tests.pipeline.evaluate.made_up import DECODER
from tests.pipeline.training.conftest import make_world

WALKS = {
    title: [Path(head) / file if head else Path(file) for file in re.findall(r"`([\w/]+\.py:[\w.]+)`", rows)]
    for title, head, rows in re.findall(
        r"^### (.+)\n\n\| step \| code below `([\w/]+)` \|\n((?:\|.*\n)+)",
        (ROOT / "docs/architecture.md").read_text(),
        re.MULTILINE,
    )
}
TRAINING = DecoderRecipe(samples=16, batch=8, lanes=4, window=5, model=DECODER)


def test_there_are_three_walks() -> None:
    assert len(WALKS) == 3
    assert all(len(walk) > 10 for walk in WALKS.values())


@pytest.mark.parametrize("title", WALKS)
def test_every_function_of_a_walk_is_there(title: str) -> None:
    for step in WALKS[title]:
        file, _, name = str(step).partition(":")
        body: list[Any] = ast.parse((ROOT / file).read_text()).body
        for part in name.split("."):
            found = [node for node in body if getattr(node, "name", "") == part]
            assert found, step
            body = found[0].body


def calls(run: Callable[[], Any]) -> list[str]:
    """The functions of ours that this thread calls, one after another; a class that is called by its own name."""
    found: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)):
            name = code.co_qualname.removesuffix(".__call__").removesuffix(".forward")
            found.append(f"{Path(code.co_filename).relative_to(ROOT)}:{name}")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def test_a_caption_and_a_step_take_their_walks_in_this_order(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    _, step, caption = WALKS.values()
    for walk, run in (
        (step, lambda: train(world.context("decoder", TRAINING))),
        (caption, lambda: make().generate(["a red fox"], [1], decoder_sampler="ddpm")),
    ):
        called = iter(calls(run))
        missing = [str(each) for each in walk if str(each) not in called]  # each is looked for behind the one before
        assert missing == []
