"""What a release has promised is still there: docs/versions.md."""

import re
from pathlib import Path

import pytest

from tests.interface import FOLDER, ROOT, broken, described, interface

RELEASES = sorted(FOLDER.glob("*.txt"))


@pytest.mark.parametrize("release", RELEASES, ids=lambda file: file.stem)
def test_nothing_that_a_release_has_is_gone_or_asks_for_more(release: Path) -> None:
    """A line here breaks somebody's program, file or script: keep it, or release a version that may break it."""
    assert broken(release.read_text().splitlines(), interface()) == []


def test_the_first_release_is_kept() -> None:
    assert "0.1.0" in [file.stem for file in RELEASES]


def test_the_changelog_has_a_short_section_for_every_release() -> None:
    sections = re.split(r"^## ([\d.]+) \(.+\)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    assert {file.stem for file in RELEASES} <= set(sections[::2])
    assert [name for name, text in zip(sections[::2], sections[1::2], strict=True) if len(text.split()) > 800] == []


def test_what_breaks_a_caller_is_found_and_what_does_not_is_not() -> None:
    def draw(caption: str, size: int = 64) -> str:
        return caption

    def more(caption: str, size: int = 64, *, seed: int = 0) -> str:
        return caption

    def needs(caption: str, size: int = 64, *, seed: int) -> str:
        return caption

    def moved(size: int = 64, caption: str = "") -> str:
        return caption

    def other(caption: str, size: int = 256) -> str:
        return caption

    def result(caption: str, size: int = 64) -> int:
        return size

    class Drawing:
        side: int

        def save(self, path: str) -> None: ...

    then = list(described("draw", draw))
    assert then == ["draw", "draw(caption) 0", "draw(size) 1 = 64", "draw -> str"]
    assert broken(then, list(described("draw", more))) == []
    assert broken(then, list(described("draw", needs))) == ["draw(seed)"]
    assert broken(then, list(described("draw", moved))) == ["draw(caption) 0", "draw(size) 1 = 64"]
    assert broken(then, list(described("draw", other))) == ["draw(size) 1 = 64"]
    assert broken(then, list(described("draw", result))) == ["draw -> str"]
    assert broken(then, []) == sorted(then)
    Drawing.__module__ = "unclip.drawing"
    assert list(described("Drawing", Drawing)) == [
        "Drawing", "Drawing.save", "Drawing.save(path) 1", "Drawing.save -> None", "Drawing.side"
    ]  # fmt: skip
