"""Tests that other people's text is escaped and shortened, and that nothing that fails stops a page."""

import pytest
from markupsafe import Markup

from pipeline.report.html import attempt, facts, flat, note, number, plain, text


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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((41_216, "41,216"), (0, "0"), (0.012344, "0.01234"), (1.2e-05, "1.2e-05"), (12.0, "12"), (1234.5, "1,234")),
        *((float("nan"), "nan"), (float("-inf"), "-inf"), (True, "True"), (None, "None"), ("<b>", "<b>")),
    ],
)
def test_numbers(value: object, shown: str) -> None:
    assert number(value) == shown


def test_plain_values() -> None:
    assert plain([1, 2.5, "<a>"]) == "1, 2.5, <a>"
    assert plain(list(range(9))) == "0, 1, 2, 3, 4, 5, 6, 7, … (9 in all)"
    assert plain([["nested"]]) == "['nested']"


def test_nested_facts_have_dotted_names_and_are_bounded() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}
    shown = facts({f"name{i}": i for i in range(1000)})
    assert "name59" in shown
    assert "name60<" not in shown
    assert "940 more" in shown


def test_attempt_turns_any_exception_into_a_line() -> None:
    def fail(message: str) -> Markup:
        raise KeyError(message)

    assert attempt("The chart", Markup, "5") == "5"
    assert attempt("The chart", fail, "<loss>") == note("The chart cannot be shown: '<loss>'")
    assert "<loss>" not in attempt("The chart", fail, "<loss>")
    assert "ZeroDivisionError" not in attempt("The chart", lambda: Markup(1 // 0))
