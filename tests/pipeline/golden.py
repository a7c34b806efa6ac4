"""Pinned keys and source digests: ``python -m tests.pipeline.golden`` records them anew and prints what changed.

A key says nothing of the code behind a stage, only its version does. So for each stage a digest of its source, and of
all of our modules that it imports, is pinned beside its version.
"""

import ast
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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

# Modules that cannot change a result, so digests leave them and what they import out.
PLUMBING = {
    "pipeline.store": "where bytes lie",
    "pipeline.store.records": "names by content, checksums",
    "pipeline.graph.artifacts": "layout of records and tables",
    "pipeline.graph.plan": "computes keys; golden keys pin it",
    "pipeline.config": "parsed values are in the keys",
    "pipeline.graph.shards": "who makes which shard",
    "pipeline.ledger": "counts",
    "pipeline.settings": "run settings",
    "pipeline.errors": "messages",
    "pipeline.progress": "messages",
    "pipeline.graph.runs": "messages",
    "pipeline.report": "shows results",
    "pipeline.store.crash": "fault tests",
    "pipeline.store.leases": "saves duplicate work",
    "pipeline.graph.ray": "starts Ray",
    "pipeline.training.distributed.launch": "starts workers",
    "pipeline.training.follow": "shows results",
    "pipeline.training.checkpoints": "saves and restores a state exactly",
    "models.folder": "layout of model folders, which has a format of its own; it imports every model",
}

# Where each stage's source begins. A preset needs no digest: its values are recipe values, and those are in the keys.
TRAINING = ("pipeline.training.train", "pipeline.training.recipes")
LISTS = ("pipeline.data.source.drawings.listing",)


def name_of(stage: Stage) -> str:
    """The name of a stage; of a training that of its task, which stages share."""
    return stage.recipe.task if stage.kind == "training" else stage.name


MODULES = {
    name_of(stage): (f"pipeline.training.tasks.{stage.recipe.task}", *TRAINING)
    if stage.kind == "training"
    else (stage.run.__module__, *LISTS * (stage.kind == "source"))
    for stage in STAGES
}


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


def versions() -> dict[str, int]:
    """The version of each stage, as the graph counts it."""
    return {name_of(stage): stage.version for stage in STAGES}


def source_digests(root: Path = ROOT) -> dict[str, str]:
    """For each stage the digest of the code that can change its result; comments and docstrings do not count."""
    return {stage: _digest(Sources(root), modules) for stage, modules in MODULES.items()}


@dataclass(frozen=True)
class Sources:
    """The texts of modules under ``root``, by dotted name."""

    root: Path

    def file(self, name: str) -> Path | None:
        """The file of one of our modules, or None for anything else."""
        if name.partition(".")[0] not in ("models", "pipeline"):
            return None
        path = self.root.joinpath(*name.split("."))
        return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)

    def imports(self, tree: ast.AST) -> Iterator[str]:
        """Our modules that a module imports, at its top or inside a function."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if self.file(alias.name))
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level and self.file(node.module):
                yield node.module
                below = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name for name in below if self.file(name))

    def closure(self, modules: Sequence[str]) -> dict[str, str]:
        """These modules and all that they import, without PLUMBING."""
        found: dict[str, str] = {}
        waiting = list(modules)
        while waiting:
            name = waiting.pop()
            file = self.file(name)
            if file is None:
                raise ValueError(f"{name}: no such module; correct MODULES in tests/pipeline/golden.py")
            if name not in found and not any(name == p or name.startswith(f"{p}.") for p in PLUMBING):
                found[name] = file.read_text()
                waiting += self.imports(parsed(found[name]))
        return found


def _digest(sources: Sources, modules: Sequence[str]) -> str:
    texts = sorted(sources.closure(modules).items())
    return hashlib.sha256(json.dumps([[name, _code(text)] for name, text in texts]).encode()).hexdigest()


@cache
def parsed(text: str) -> ast.Module:
    """The syntax tree of a module, which nobody changes."""
    return ast.parse(text)


@cache
def _code(text: str) -> Any:
    return _plain(parsed(text))


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
    now, digests = versions(), source_digests()
    stages = {stage: {"version": now[stage], "digest": digests[stage]} for stage in MODULES}
    return {"keys": golden_keys(), "stages": stages}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        name: leaf for key, inner in value.items() for name, leaf in _flat(inner, f"{prefix} {key}".strip()).items()
    }


def main() -> int:
    before = _flat(json.loads(FILE.read_text())) if FILE.exists() else {}
    golden_now = golden()
    now = _flat(golden_now)
    FILE.write_text(json.dumps(golden_now, indent=2) + "\n")
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    for name in changed:
        print(f"{name}: {str(before.get(name))[:12]} -> {str(now.get(name))[:12]}")
    print(f"{len(changed)} changed in {FILE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
