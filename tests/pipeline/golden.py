"""Pinned keys and source digests: ``python -m tests.pipeline.golden`` records them anew and prints what changed.

A key says nothing of the code behind a stage, only its version does. So for each stage a digest of its source, and of
all code that it imports and that makes results, is pinned beside its version.
"""

import ast
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.house import imports, module_name, tracked
from pipeline.build import STAGES, build
from pipeline.config import load_config
from pipeline.data.source.stage import scan
from pipeline.errors import UserError
from pipeline.graph.plan import plan
from pipeline.graph.stages import Stage
from pipeline.store import open_store

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("golden.json")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NO_LIST = {"source": "s", "captions": "c"}  # source keys of a shipped configuration whose list is the user's to bring
# Folders whose code makes results; what it imports besides says where bytes lie, who works and what is shown.
MAKING = tuple(f"pipeline/{room}" for room in ("data", "training", "sampling", "evaluate"))
FOLDERS = "models.folder"  # of models: their layout has a format of its own, and it imports every model


def golden_keys() -> dict[str, dict[str, str]]:
    """For every shipped configuration the key of each stage, on an empty store."""
    keys = {}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config = load_config(path)
        with tempfile.TemporaryDirectory() as folder:
            store = open_store(folder)
            try:
                source_keys = scan(config.source, store, write=False).keys
            except UserError:
                source_keys = NO_LIST
            verdicts = plan(build(config), source_keys, config.project, store, {})
        keys[path.name] = {verdict.stage: verdict.key for verdict in verdicts}
    return keys


def source_digests(changed: Mapping[str, str] | None = None) -> dict[str, str]:
    """For each stage the digest of the code that can change its result; comments and docstrings do not count.

    ``changed``: texts that stand for those of modules, by name.
    """
    texts = {module_name(file): file.read_text() for file in tracked("models", *MAKING)} | dict(changed or {})
    del texts[FOLDERS]
    below = {name: imports(ast.parse(text), set(texts)) for name, text in texts.items()}
    return {stage.name: _digest([[n, _code_digest(texts[n])] for n in _closure(stage, below)]) for stage in STAGES}


def _closure(stage: Stage, below: Mapping[str, set[str]]) -> list[str]:
    """The modules that make a stage's result, and all that they import."""
    waiting, found = [stage.run.__module__], set[str]()
    if stage.kind == "training":  # its task is imported by its name
        waiting.append(f"pipeline.training.tasks.{stage.recipe.task}")
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += below[name]
    return sorted(found)


def _digest(code: Any) -> str:
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


@cache
def _code_digest(text: str) -> str:
    return _digest(_plain(ast.parse(text)))


def _plain(node: Any) -> Any:
    """A syntax tree as JSON without docstrings, and without empty fields, of which newer Pythons have more."""
    if isinstance(node, ast.AST):
        fields = {name: _plain(value) for name, value in ast.iter_fields(node) if value not in (None, [])}
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            fields["body"] = fields["body"][1:]
        return [type(node).__name__, fields]
    return [_plain(item) for item in node] if isinstance(node, list) else repr(node)


def golden() -> dict[str, Any]:
    """Everything that golden.json holds, as it is now."""
    digests = source_digests()
    stages = {stage.name: {"version": stage.version, "digest": digests[stage.name]} for stage in STAGES}
    return {"keys": golden_keys(), "stages": stages}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their names, one after another."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {n: leaf for key, inner in value.items() for n, leaf in flat(inner, f"{prefix} {key}".strip()).items()}


def main() -> int:
    before, now = flat(json.loads(FILE.read_text())), golden()
    FILE.write_text(json.dumps(now, indent=2) + "\n")
    for name in sorted(before.keys() | flat(now).keys()):
        if (then := before.get(name)) != (value := flat(now).get(name)):
            print(f"{name}: {str(then)[:12]} -> {str(value)[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
