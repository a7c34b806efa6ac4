"""``python -m tests.messages``: writes what ``unclip`` prints and raises to one file, which is read as text.

A value that is filled in stands in braces. Texts that a function returns, such as the plan, are in the tests of theirs.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from benchmarks.house import SOURCE

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests/messages.txt"
# Names of what is raised, printed and logged, with the number of the argument from which on texts are messages.
SAID = {
    "UserError": 0,
    "ValueError": 0,
    "OtherFormat": 1,
    "Unreachable": 0,
    "Finding": 2,
    "Refusal": 0,
    "say": 0,
    "say_once": 0,
    "warn": 0,
    "info": 0,
    "warning": 0,
    "error": 0,
}


def text(node: ast.expr) -> str:
    """Returns the text of a literal, with the source of what is filled in; "" for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (f"{{{ast.unparse(p.value)}}}" if isinstance(p, ast.FormattedValue) else text(p) for p in node.values)
        return "".join(parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left) + text(node.right)
    return ""


def messages(file: Path) -> Iterator[str]:
    """Yields the messages of a file, in order, each on a line: what is said, and what is yielded for others to say."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call | ast.Yield)]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            arguments = node.args[SAID[name] :] if name in SAID else []
        else:
            arguments = [node.value] if node.value else []
        for argument in arguments:
            if " " in (found := text(argument)):
                yield found.replace("\n", "\\n")


def all_messages() -> str:
    """Returns the messages of all files, by file."""
    found = ""
    for folder in SOURCE:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if lines := list(dict.fromkeys(messages(file))):
                found += f"\n# {file.relative_to(ROOT).as_posix()}\n" + "".join(f"{line}\n" for line in lines)
    return found.lstrip("\n")


if __name__ == "__main__":
    FILE.write_text(all_messages())
