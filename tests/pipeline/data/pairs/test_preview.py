"""A look at a list before there is a configuration: its head, its size, and words that all its captions share."""

from pathlib import Path

import pytest

from pipeline.data.pairs import preview
from pipeline.data.source.drawings.listing import drawing_rows
from pipeline.data.source.recipe import SourceRecipe
from pipeline.errors import UserError

THINGS = [f"{size} {thing}" for size in ("a tiny", "a huge", "an old") for thing in ("cat", "dog", "tree", "house")]


def test_a_look_at_a_long_list_ends_early_but_sees_the_head_of_every_list(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(preview, "MOST_ROWS", 3)
    for name in ("first.csv", "other.csv"):
        (tmp_path / name).write_text("url,caption\n" + "".join(f"http://a/{i}.png,a cat\n" for i in range(5)))
    monkeypatch.chdir(tmp_path)
    first, other = "first.csv", "other.csv"
    seen = preview.preview(SourceRecipe((first, other)))
    assert (seen.rows, seen.more, seen.pairs) == (4, True, 10)
    monkeypatch.setattr(preview, "MOST_COUNTED", 3)
    assert preview.preview(SourceRecipe((first, other))).pairs == 4 + 3
    Path("bad.csv").write_text("url\nx\n")
    with pytest.raises(UserError, match="no column caption"):
        preview.preview(SourceRecipe((first, "bad.csv")))


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([(f"{thing} on a white background",) for thing in THINGS], (12, "a white background")),
        ([(f"an icon of {thing}", thing) for thing in THINGS], (0, "")),
        ([("a tall green tree in a park",)] * 100, (0, "")),  # one text of many images is a class, not a style
        ([(f"{kind} of a {thing}",) for kind in ("a flat icon", "one old photo") for thing in range(50)], (100, "")),
    ],
)
def test_what_counts_as_shared_words(rows: list[tuple[str, ...]], found: tuple[int, str]) -> None:
    counted, words = preview.framed_rows(rows)
    assert counted == found[0]
    assert words == found[1] or words in ("a flat icon", "one old photo")


@pytest.mark.slow
def test_the_quick_starts_own_captions_are_no_frames() -> None:
    rows = [row.captions for row in drawing_rows("full")]
    assert preview.framed_rows(rows).rows == 0
