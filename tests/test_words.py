"""What no text of the repository may say."""

import re

from benchmarks.house import tracked
from tests.chain import ROOT


def test_no_message_or_page_names_a_package_of_the_index_that_is_not_ours() -> None:
    """Whoever takes that name could run code where it is followed. In pyproject.toml it is the checkout itself."""
    named = re.compile(rb"unclip[-_]ray\[", re.IGNORECASE)
    found = {file.relative_to(ROOT).as_posix() for file in tracked(ends="") if named.search(file.read_bytes())}
    assert found == {"pyproject.toml"}


def test_every_page_that_a_comment_or_a_text_names_is_there() -> None:
    named = re.compile(rb"(?<![\w./-])(?:docs|lab)/(?:README|[a-z0-9_/-]+)\.(?:md|json|ipynb)\b")
    found = {page.decode() for file in tracked(ends="") for page in named.findall(file.read_bytes())}
    assert {"docs/captions.md", "lab/README.md"} <= found
    assert [page for page in sorted(found) if not (ROOT / page).is_file()] == []
