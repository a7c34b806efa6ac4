"""The code and the docs say what a native engineer of the field would: two lists of what they do not say."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks.house import SOURCE, prose, tics, tracked
from tests.chain import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs")
VERB = re.compile(r"[A-Z][a-z]+s\b|\"\"\"|``")  # "Returns ...", "Passes ..."
FIELD = {  # the field's word, and what must not stand for it
    "image": r"\bpictures?\b",
    "held-out rows": r"rows that taught",
    "trained on": r"\blearnt from\b",
    "depends on": r"\bhangs? on\b",
    "NaN, Inf, non-finite": r"\bis no number\b",
    "the current release": r"\bbundle that stands\b",
    "keep (a pin)": r"\blet stand\b",
    "read-only callers": r"\bwho only looks\b",
}


@cache
def lines(file: Path) -> list[tuple[int, str]]:
    return list(prose(file))


def test_no_tic_is_left() -> None:
    assert tics() == []


@pytest.mark.parametrize("word", FIELD)
def test_the_fields_word_is_used(word: str) -> None:
    other = re.compile(FIELD[word])
    files = (*tracked(*PAGES, ends=".md"), *tracked(*SOURCE))
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in lines(file)
        if other.search(line)
    ]
    assert found == []


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    found = []
    for file in tracked(*SOURCE):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "Has none.").splitlines()[0]
                if not VERB.match(first):
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {first}")
    assert found == []


def test_no_message_or_page_names_a_package_of_the_index_that_is_not_ours() -> None:
    """Whoever takes that name could run code where it is followed. In pyproject.toml it is the checkout itself."""
    named = re.compile(rb"unclip[-_]ray\[", re.IGNORECASE)
    found = {file.relative_to(ROOT).as_posix() for file in tracked(ends="") if named.search(file.read_bytes())}
    assert found == {"pyproject.toml"}
