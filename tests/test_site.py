"""What the site is made of: its navigation, its generated parts, and its links. ``make site`` builds it, in CI."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

from pipeline.ledger import REASONS
from serve.settings import ServeSettings
from tests.reference import KINDS
from tests.site import LINK, MARKER, PAGES, ROOT, generated, outline, pages_of, prepare


def test_every_page_has_its_place_in_the_navigation() -> None:
    shown = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(shown) == sorted(place for place in PAGES.values() if place.endswith(".md"))


def test_programs_find_every_page_by_what_one_can_do_after_it() -> None:
    text = outline()
    found = dict(re.findall(r"^- \[.+\]\((.+)/\): (.+)$", text, re.MULTILINE))
    assert len(found) == sum(place.endswith(".md") for place in PAGES.values())
    assert found["start"].startswith("After this tutorial you have trained a whole unCLIP stack on this machine")
    assert found["how"].startswith("After these pages you know what each stage reads")
    assert "](" not in "".join(found.values())
    assert text.startswith("# unclip-ray\n\n> Train your own unCLIP")


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=lambda page: page.stem)
def test_generated_parts_name_what_they_are_made_from(page: Path) -> None:
    text = page.read_text()
    assert len(MARKER.findall(text)) == len(re.findall(r"^\[(?:Fields|Table|Reference) of", text, re.MULTILINE))
    for kind, names, link in MARKER.findall(text):
        assert len(generated(kind, names).splitlines()) > 2, names
        source = (page.parent / link).resolve()
        assert source.is_file(), link
        if kind == "Fields":
            first = (KINDS | {"ServeSettings": ServeSettings})[names.split(", ")[0]]
            assert re.search(rf"^class {first.__name__}\b", source.read_text(), re.MULTILINE), names
            assert first.__name__ == "Run" or inspect.getsourcefile(first) == str(source), names


def test_every_reason_and_every_command_is_in_the_reference() -> None:
    assert [
        reason for reason in REASONS if f"| `{reason}` | {REASONS[reason]} |" not in generated("Table", "reasons")
    ] == []
    assert "### unclip run\n" in generated("Table", "commands")


def test_all_links_of_the_site_lead_to_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.site.formula", lambda latex: latex)
    prepare(tmp_path / "docs")
    for page in (tmp_path / "docs").rglob("*.md"):
        if page.relative_to(tmp_path / "docs").parts[0] != "code":
            for link in LINK.finditer(page.read_text()):
                path = link[2].partition("#")[0]
                assert not path or "://" in path or (page.parent / path).is_file(), f"{page.name}: {link[0]}"
