"""The recording shows what a terminal shows, each screen in its time, and is an image that a page can hold."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

from tests.recording import END_S, LINE, MOST_SCREENS, READING_S, ROWS, SHORTEST_S, film, record, screens, svg
from tests.site import DOCS


def test_a_command_is_seen_as_in_a_terminal(tmp_path: Path) -> None:
    code = "import sys; print('plan', sys.stdout.isatty()); print('  1 of 2\\r\\033[K', end=''); print('done & <gone>')"
    (*_, (_, last)) = screens(record([sys.executable, "-c", code], tmp_path))
    assert last == ("plan True", "done & <gone>", *[""] * (ROWS - 2))


def test_idle_time_is_short_and_many_new_lines_are_shown_for_long() -> None:
    plan, stage, end = ("a", "b", "c", "d"), ("a", "b", "c", "50%"), ("x", "y", "z", "d")
    whole = 1000.0
    early = whole / MOST_SCREENS / 4
    shown = [(0.0, plan), (early, ("not", "yet")), (2 * early, plan), (whole / 2, stage), (whole, end)]
    assert film(shown) == [(3 * READING_S, plan), (SHORTEST_S, stage), (END_S, end)]
    busy = [(whole * i / 5000, (str(i),)) for i in range(5001)]
    frames = film(busy)
    assert len(frames) <= MOST_SCREENS + 1
    assert frames[-1] == (END_S, ("5000",))


def test_every_screen_is_an_image_that_shows_its_lines_once() -> None:
    first, second = ("a <b> & c", "", "  d"), ("  d", "", "e")
    root = ElementTree.fromstring(svg("a title", [(1.0, first), (3.0, second)]))
    name = "{http://www.w3.org/2000/svg}"
    texts = {text.get("id"): text.text for text in root.iter(f"{name}text")}
    assert list(texts.values()) == ["a <b> & c", "  d", "e"]
    seen = [
        [(texts[(use.get("href") or "")[1:]], use.get("y")) for use in frame]
        for frame in root.iter(f"{name}g")
        if frame.get("transform")
    ]
    assert seen == [[("a <b> & c", "0"), ("  d", str(2 * LINE))], [("  d", "0"), ("e", str(2 * LINE))]]
    style = next(root.iter(f"{name}style")).text or ""
    height = ROWS * LINE
    assert re.findall(r"([\d.]+)%{transform:translateY\((-?\d+)px\)}", style) == [
        ("0.000", "0"),
        ("25.000", f"{-height}"),
    ]
    assert "film 4.0s step-end" in style
    assert f"animation:none;transform:translateY({-height}px)" in style


def test_the_one_in_the_documents_is_small_and_loads_nothing() -> None:
    text = (DOCS / "images/peek.svg").read_text()
    assert len(text.encode()) < 300 << 10
    assert "$ unclip peek" in text
    assert "report: out/nano/report.html" in text
    assert not re.search(r"(?:href|src)=\"(?!#)|url\(|@import|<script", text)
    ElementTree.fromstring(text)
