"""What a release promises to keep: names of Python, configurations, the command line, the image API, and reasons.

``python -m tests.interface`` writes those of the version in pyproject.toml, which is done when it is released.
"""

import dataclasses
import importlib
import inspect
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from benchmarks.house import SOURCE
from jobs.command_line import command_line, leaves
from pipeline.config import PRESETS, make_config
from pipeline.ledger import REASONS
from serve.settings import ServeSettings
from tests.reference import ENDPOINTS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests/interfaces"
MODULES = ("unclip", "unclip.commands", "unclip.metrics", "unclip.sources", "unclip.stages")
LITERALS = (bool, int, float, str, type(None))


def described(name: str, thing: Any) -> Iterator[str]:
    """Yields a line for a name, and for what a program can read from it or pass to it."""
    yield name
    if not inspect.isclass(thing):
        yield from (parameters(name, thing) if callable(thing) else ())
        return
    ours = [base for base in thing.__mro__ if base.__module__.partition(".")[0] in SOURCE]
    members = {each for base in ours for each in (*vars(base), *vars(base).get("__annotations__", ()))}
    made = any({"__init__", "__new__"} & vars(base).keys() for base in ours)
    if made and not getattr(thing, "_is_protocol", False):
        yield from parameters(name, thing)
    for each in sorted(name for name in members if name[0] != "_"):
        yield f"{name}.{each}"
        if inspect.isroutine(method := getattr(thing, each, None)):
            yield from parameters(f"{name}.{each}", method)


def parameters(name: str, function: Any) -> Iterator[str]:
    """Yields a line for each parameter, with its place where it has one and its default, and one for the result."""
    signature = inspect.signature(function)
    for place, each in enumerate(signature.parameters.values()):
        if each.name == "self":
            continue
        where = f" {place}" if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) else ""
        default = f" = {each.default!r}" if type(each.default) in LITERALS else " = ..."
        optional = each.default is not each.empty or each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        yield f"{name}({each.name}){where}{default if optional else ''}"
    result = signature.return_annotation
    if result is not signature.empty and not inspect.isclass(function):
        yield f"{name} -> {result if isinstance(result, str) else getattr(result, '__name__', result)}"


def settings(value: Any, prefix: str) -> Iterator[str]:
    """Yields the dotted names of a configuration's fields."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        name = f"{prefix}{field.name}"
        yield from (settings(inner, f"{name}.") if dataclasses.is_dataclass(inner) else [name])


def command_words() -> Iterator[str]:
    """Yields every command with each of its words, and with each value of those that have few."""
    for leaf in leaves(command_line(["run"])):
        for action in leaf._actions:
            for word in action.option_strings or [str(action.metavar or action.dest)]:
                yield f"{leaf.prog} {word}"
                yield from (f"{leaf.prog} {word} {choice}" for choice in action.choices or ())


def interface() -> list[str]:
    """Returns all that a program, a file or a script of a user may name, a line each."""
    found: list[str] = []
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            found += described(f"{module.__name__}.{name}", getattr(module, name))
    found += settings(make_config({"project": "p", "store": "s", "source": {"paths": ["a.csv"]}}), "configuration ")
    found += [f"configuration preset {name}" for name in PRESETS] + ["configuration scale"]
    found += command_words()
    for kind, endpoint in ENDPOINTS.items():
        fields = kind.model_fields  # type: ignore[attr-defined]
        found += [f"POST {endpoint} {name}" for name, each in fields.items() if each.annotation is not type(None)]
    found += settings(ServeSettings(), "unclip serve ")
    found += [f"reason {reason}" for reason in REASONS]
    return list(dict.fromkeys(found))


def broken(then: Collection[str], now: Collection[str]) -> list[str]:
    """Returns the lines of an interface that are gone, and those of parameters that its callers do not know of."""
    new = sorted({*now} - {*then})
    needed = [line for line in new if "(" in line and " = " not in line and line.partition("(")[0] in then]
    return [*sorted({*then} - {*now}), *needed]


def main() -> None:
    """Writes the file of this version."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{version}.txt").write_text("".join(f"{line}\n" for line in interface()))


if __name__ == "__main__":
    main()
