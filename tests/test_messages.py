"""All that is printed and raised stands in one file, so that a changed message is read as a sentence."""

import ast
import re
import runpy
from pathlib import Path

from benchmarks.house import DOCSTRINGS, SOURCE
from pipeline import pages
from tests.messages import FILE, ROOT, all_messages, messages


def test_the_messages_are_those_that_were_read() -> None:
    assert all_messages() == FILE.read_text(), "read the new messages, then: python -m tests.messages"


def test_literals_with_values_are_found_wherever_they_are_raised_or_printed(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text(
        'raise UserError(f"{path}: not here " + "at all")\n'
        'log.warning("of %s: %s", a, b)\n'
        'Finding("problem", "nodes", "does not answer")\n'
        'say("one\\ntwo three")\n'
        'other("not a message")\n'
        'def remarks():\n    yield f"{rows} rows"\n    yield other\n'
        "say(text)\n"
    )
    assert list(messages(file)) == [
        "{path}: not here at all",
        "of %s: %s",
        "does not answer",
        "one\\ntwo three",
        "{rows} rows",
    ]


def test_every_page_that_a_text_names_is_there() -> None:
    """Texts name pages by ``page``: where the wheel is installed, docs/ is not in the current folder."""
    pointed, plain = set[str](), set[str]()
    for file in (file for folder in SOURCE for file in (ROOT / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        docstrings = {
            id(getattr(node.body[0], "value", None))
            for node in nodes
            if isinstance(node, DOCSTRINGS) and _explained(node)
        }
        for node in nodes:
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "page":
                pointed.add(ast.literal_eval(node.args[0]))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                plain |= set(re.findall(r"docs/\w\S*", node.value))
    assert {"captions", "export"} <= set(re.findall(r"{page\('([^']+)'\)}", FILE.read_text())) <= pointed
    assert [name for name in pointed if not (ROOT / f"docs/{name}.md").is_file()] == []
    assert plain == set()


def _explained(node: ast.AST) -> bool:
    return ast.get_docstring(node) is not None


def test_a_page_is_named_where_it_lies(tmp_path: Path) -> None:
    assert pages.page("how/bundle") == "docs/how/bundle.md"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/captions.md").touch()
    (tmp_path / "pages.py").write_text(Path(pages.__file__).read_text())
    installed = runpy.run_path(str(tmp_path / "pages.py"))["page"]
    assert installed("captions") == str(tmp_path / "docs/captions.md")
