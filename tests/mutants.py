"""Mutation testing: ``python -m tests.mutants models/diffusion/process.py`` prints the faults that no test notices.

Each function of a file runs with one fault at a time, made in its syntax tree: another operator or number, two
arguments swapped, a call left out. The tests of the file, or those that are named behind it, have to fail under each.
Some faults change nothing that anybody could notice, so a survivor is a question and no error.
"""

import ast
import contextlib
import importlib
import inspect
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One fault in a function."""

    function: str
    line: int
    change: str
    code: CodeType


def mutants(source: str, file: str = "<source>") -> Iterator[Mutant]:
    """Yields every fault of every function of a module, one after the other."""
    tree = ast.parse(source)
    for function, name in _functions(tree.body, ""):
        for parent in list(ast.walk(ast.Module(function.body, []))):
            for field, index, node in _children(parent):
                before = ast.unparse(parent) if isinstance(parent, ast.expr) else ast.unparse(node)
                for fault in _faults(node):
                    _put(parent, field, index, fault)
                    after = ast.unparse(parent) if isinstance(parent, ast.expr) else ast.unparse(fault)
                    code = _code_of(compile(ast.fix_missing_locations(tree), file, "exec"), name)
                    _put(parent, field, index, node)
                    yield Mutant(name, getattr(parent, "lineno", 0), f"{before}  ->  {after}", code)


def _functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[ast.FunctionDef, str]]:
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield node, prefix + node.name
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")


def _children(parent: ast.AST) -> Iterator[tuple[str, int | None, ast.AST]]:
    for field, value in ast.iter_fields(parent):
        if isinstance(value, list):
            yield from ((field, i, item) for i, item in enumerate(value) if isinstance(item, ast.AST))
        elif isinstance(value, ast.AST):
            yield field, None, value


def _faults(node: ast.AST) -> Iterator[ast.AST]:
    """Yields what may stand in the place of a node."""
    if type(node) in OPERATORS:
        yield OPERATORS[type(node)]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Call):
        # A name with arguments behind its method is a module more often than a value.
        if isinstance(node.func, ast.Attribute) and not (isinstance(node.func.value, ast.Name) and node.args):
            yield node.func.value
        if len(node.args) > 1 and all(isinstance(argument, ast.Name) for argument in node.args[:2]):
            yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _code_of(code: CodeType, name: str) -> CodeType:
    head, _, rest = name.partition(".")
    [found] = [each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == head][:1]
    return _code_of(found, rest) if rest else found


@contextlib.contextmanager
def faulty(module: ModuleType, mutant: Mutant) -> Iterator[None]:
    """Within it the function of a mutant runs with its fault, wherever it was imported."""
    found: Any = module
    for name in mutant.function.split("."):
        found = vars(found)[name]
    forget = getattr(found, "cache_clear", lambda: None)
    found = inspect.unwrap(found.fget if isinstance(found, property) else getattr(found, "__func__", found))
    sound, found.__code__ = found.__code__, mutant.code
    forget()
    try:
        yield
    finally:
        found.__code__ = sound
        forget()


def files_of_tests(file: str) -> list[str]:
    """Returns the test files that are named after a module: test_STEM.py, test_FOLDER_STEM.py."""
    module = Path(file)
    names = {f"test_{module.stem}.py", f"test_{module.parent.name}_{module.stem}.py"}
    return [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if path.name in names]


def survivors(file: str, tests: list[str]) -> tuple[list[Mutant], int]:
    """Returns the mutants of a file under which its tests pass, and the number of all."""
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    found = list(mutants(Path(file).read_text(), file))
    if not _pass(tests):
        raise SystemExit(f"{' '.join(tests) or file}: fails, or has no test, without a fault")
    left = []
    for each in found:
        try:
            with faulty(module, each):
                if _pass(tests):
                    left.append(each)
        except (ValueError, TypeError):  # a closure, or a name that a decorator has taken
            continue
    return left, len(found)


def _pass(tests: list[str]) -> bool:
    words = ["-x", "-q", "--assert=plain", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow", "--timeout=60"]
    with contextlib.redirect_stdout(io.StringIO()):
        return bool(tests) and pytest.main([*words, *tests]) == 0


def main(words: list[str]) -> int:
    file, *tests = words
    left, of = survivors(file, tests or files_of_tests(file))
    for each in left:
        print(f"{file}:{each.line}: {each.function}: {each.change}")
    print(f"{file}: {of - len(left)} of {of} faults are noticed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
