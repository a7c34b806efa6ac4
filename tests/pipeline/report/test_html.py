"""Tests that other people's text is escaped and shortened, and that nothing that fails stops a page."""

import math
from typing import Any

from markupsafe import Markup

from pipeline.report.html import attempt, facts, note, number, plain, text


def test_text_becomes_one_short_line_that_templates_escape() -> None:
    assert str(note("<script>alert('1')</script> & more")).strip() == (
        '<p class="note">&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; more</p>'
    )
    assert "<i>" not in facts({"<i>": {"<i>": "<i>", "b": ["<i>"]}}).replace("<bdi>", "")
    assert text("a\n\tb\x00\x1b c\ud800") == "a b c"
    assert text("x" * 10_000, 100) == "x" * 99 + "…"
    assert text(" " * 10_000 + "end") == "…"
    assert text("x" * 100, 100) == "x" * 100
    assert text("👩\u200d🚒") == "👩\u200d🚒"  # joined emoji stay joined


def test_values_are_for_reading() -> None:
    shown: dict[Any, str] = {
        41_216: "41,216",
        0: "0",
        0.012344: "0.01234",
        1.2e-05: "1.2e-05",
        12.0: "12",
        1234.5: "1,234",
    }
    shown |= {-math.inf: "-inf", True: "True", None: "None", "<b>": "<b>"}
    assert {value: number(value) for value in shown} == shown
    assert number(math.nan) == "nan"
    assert plain([1, 2.5, "<a>"]) == "1, 2.5, <a>"
    assert plain(list(range(9))) == "0, 1, 2, 3, 4, 5, 6, 7, … (9 in all)"
    assert plain([["nested"]]) == "['nested']"


def test_nested_facts_have_dotted_names_and_are_bounded() -> None:
    shown = facts({"a": {"b": 1, "c": {"d": 2}}} | {f"name{i}": i for i in range(1000)})
    assert all(f"<td>{name}</td>" in shown for name in ("a.b", "a.c.d", "name57"))
    assert "name58<" not in shown
    assert "942 more" in shown


def test_attempt_turns_any_exception_into_a_line() -> None:
    def fail(message: str) -> Markup:
        raise KeyError(message)

    assert attempt("The chart", Markup, "5") == "5"
    assert attempt("The chart", fail, "<loss>") == note("The chart cannot be shown: '<loss>'")
    assert "<loss>" not in attempt("The chart", fail, "<loss>")
