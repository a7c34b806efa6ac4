"""What may be imported where, beyond the layers that lint-imports checks (see pyproject.toml)."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RAY = {
    "cluster/client.py",
    "pipeline/graph/ray.py",
    "pipeline/graph/shards.py",
    "pipeline/training/distributed/launch.py",
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


def test_ray_is_known_in_few_files() -> None:
    files = {str(f.relative_to(ROOT)) for f in _files("models", "pipeline", "jobs", "cluster") if "ray" in _imports(f)}
    assert files == RAY


def test_configuration_and_graph_need_neither_ray_nor_torch() -> None:
    code = (
        "import sys; from pipeline.config import load_config; from pipeline.build import build;"
        "build(load_config('configs/nano.yaml')); import jobs.run, jobs.plan;"
        "heavy = {'ray', 'torch', 'img2dataset', 'open_clip', 'boto3'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_relevant_file_is_small() -> None:
    for file in _files("models", "pipeline", "jobs", "cluster"):
        assert len(file.read_text().splitlines()) <= 400, f"{file}: over 400 lines; one idea a file"
