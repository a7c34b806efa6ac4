"""How many held-out rows a figure needs, for plan, doctor, trainings, evaluation and report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.progress import counted

HELD_OUT_SPLITS = ("test", "validation")  # figures are measured on the first of these that has enough rows
FEWEST = 8  # rows; with fewer, chance decides more than a model does, and a contrastive loss of one row is 0


def too_few(rows: int, split: str, of: str = "") -> str:
    """Returns why ``rows`` of a ``split`` ("test" or "validation") give no figure, and what to do.

    ``of`` narrows down which rows are counted: too_few(2, "test", " with an image of 1024 px") is "2 test pairs with
    an image of 1024 px, and a figure needs 8; set source.test to 0.2 or add pairs".
    """
    return f"{counted(rows, f'{split} pair')}{of}, and a figure needs {FEWEST}; set source.{split} to 0.2 or add pairs"


def short_splits(held_out: Mapping[str, int]) -> Iterator[str]:
    """Yields a line for each split of which a list has fewer rows than a figure needs, given its rows by split."""
    for split in HELD_OUT_SPLITS:
        if held_out.get(split, 0) < FEWEST:
            yield too_few(held_out.get(split, 0), split)
