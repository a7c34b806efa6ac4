"""What may be imported where, beyond the layers that lint-imports checks (see pyproject.toml)."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from benchmarks.house import ROOT, SOURCE, floors, import_graph

OURS = (*SOURCE, "tests", "benchmarks")
RAY = {
    "cluster/client.py",
    "pipeline/graph/ray.py",
    "pipeline/graph/shared.py",
    "pipeline/graph/shards.py",
    "pipeline/graph/workers.py",
    "pipeline/training/distributed/launch.py",
    "serve/app.py",
    "serve/processes.py",
    "unclip/pairs.py",
}


def _imports(file: Path) -> set[str]:
    """Top-level packages that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def _files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def test_what_somebody_else_may_have_written_is_not_unpickled() -> None:
    """Between our own processes parts of shards are; a state of torch is read as numbers."""
    loads = re.compile(r"(?:pickle|torch|joblib|np|numpy)\.loads?\(.*")
    found = {(str(f.relative_to(ROOT)), line) for f in _files(*SOURCE) for line in loads.findall(f.read_text())}
    unpickled = {(file, line) for file, line in found if "weights_only=True" not in line and not line.startswith("np.")}
    assert {file for file, _ in unpickled} == {"pipeline/graph/workers.py"}
    assert not [line for _, line in found if "allow_pickle=True" in line]


def test_no_files_import_each_other() -> None:
    """Imports inside functions, and those for types alone, count too."""
    assert floors(import_graph())[1] == 0


def test_ray_is_known_in_few_files() -> None:
    files = {str(f.relative_to(ROOT)) for f in _files(*SOURCE) if "ray" in _imports(f)}
    assert files == RAY


@pytest.mark.integration
def test_configuration_and_graph_need_neither_ray_nor_torch() -> None:
    code = (
        "import sys; from pipeline.config import load_config; from pipeline.build import build;"
        "build(load_config('configs/nano.yaml')); import jobs.run, jobs.plan;"
        "heavy = {'ray', 'torch', 'img2dataset', 'open_clip', 'boto3'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.integration
def test_a_training_without_captions_imports_no_open_clip() -> None:
    """It takes seconds, in each worker of each attempt."""
    code = (
        "import sys; import pipeline.training.train, pipeline.training.tasks.upsampler;"
        "assert 'open_clip' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_relevant_file_is_small() -> None:
    for file in _files(*SOURCE):
        assert len(file.read_text().splitlines()) <= 400, f"{file}: over 400 lines; one idea a file"


def test_a_public_name_of_the_pipeline_means_one_thing() -> None:
    places: dict[str, set[Path]] = {}
    for file in _files("pipeline"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, set()).add(file)
    several = {name: files for name, files in places.items() if len(files) > 1}
    assert several.keys() <= {"main", "make"}, several  # of processes of their own; of the task that a recipe names


def test_files_with_tests_in_a_browser_say_so_in_the_line_that_make_looks_for() -> None:
    texts = {file: file.read_text() for file in _files("tests") if file != Path(__file__)}
    marked = {file for file, text in texts.items() if "pytest.mark.browser" in text}
    assert marked == {file for file, text in texts.items() if "\npytestmark = pytest.mark.browser\n" in text}


def test_examples_need_the_public_interface_alone() -> None:
    for file in _files("examples"):
        assert not (_imports(file) & {*OURS}) - {"unclip"}, file


def test_tests_and_benchmarks_import_what_is_there() -> None:
    """mypy says so, too, but later."""
    for file in _files("tests", "benchmarks", "examples"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in OURS:
                for alias in node.names:
                    assert _is_there(node.module or "", alias.name), f"{file}: {node.module}.{alias.name}"


def _is_there(module: str, name: str) -> bool:
    """Returns whether a module of ours has a name: as a module below it, or somewhere in its file."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    below = (path / f"{name}.py").is_file() or (path / name).is_dir()
    return below or (file.is_file() and name in _words(file))


@cache
def _words(file: Path) -> set[str]:
    return set(re.findall(r"\w+", file.read_text()))


def test_tests_share_helpers_and_fixtures_and_not_each_other() -> None:
    """A test that is moved, renamed or deleted breaks no other."""
    imports = re.compile(r"^ *(?:from|import) tests\.(?:\w+\.)*test_\w+\b", re.M)
    assert [str(file.relative_to(ROOT)) for file in _files("tests") if imports.search(file.read_text())] == []
