"""cluster/Dockerfile cannot be built here; what can be said without building it, and a linter does not say."""

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TEXT = re.sub(r"\\\n\s*", " ", (ROOT / "cluster/Dockerfile").read_text())
INSTRUCTIONS = [line.partition(" ")[::2] for line in TEXT.splitlines() if line and not line.startswith("#")]


def words(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def copied() -> list[str]:
    return [source for rest in words("COPY") for source in shlex.split(rest)[:-1]]


def test_every_base_is_pinned_and_has_a_python_for_us() -> None:
    for base in words("FROM"):
        name, version = base.split()[0].split(":")
        assert name == "python"
        python = re.fullmatch(r"(\d+\.\d+\.\d+)-slim-\w+", version)
        assert python, f"{base}: not pinned to a version"
        assert python[1] in SpecifierSet(PROJECT["project"]["requires-python"])


def test_it_does_not_run_as_root() -> None:
    """Kubernetes refuses a name under runAsNonRoot: it cannot see that it is not root's."""
    assert words("USER")[-1] == "1000"
    assert any("useradd --uid 1000" in command for command in words("RUN"))
    *_, last = (name for name, _ in INSTRUCTIONS if name in ("RUN", "COPY", "USER"))
    assert last == "USER"


def test_nothing_comes_from_an_address_or_holds_a_secret() -> None:
    assert {name for name, _ in INSTRUCTIONS} <= {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "USER"}  # no ADD
    assert "://" not in TEXT
    named = " ".join(words("ARG") + words("ENV"))
    assert not re.search(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY", named, re.IGNORECASE)


def test_the_layer_of_torch_has_the_projects_bounds() -> None:
    needed = {r.name: r for r in map(Requirement, PROJECT["project"]["dependencies"])}
    (command,) = (command for command in words("RUN") if "TORCH_INDEX" in command)
    asked = [Requirement(word) for word in shlex.split(command) if re.match(r"torch(vision)?\W", word)]
    assert {r.name for r in asked} == {"torch", "torchvision"}
    assert all(r.specifier == needed[r.name].specifier for r in asked)


def test_only_what_is_copied_gets_into_the_context() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert [rule[1:] for rule in rules if rule.startswith("!")] == copied()
    assert all((ROOT / source).exists() for source in copied())
    ignored = [rule for rule in rules[1:] if not rule.startswith("!")]
    assert any(fnmatch.fnmatch("pipeline/__pycache__", rule.replace("**/", "*")) for rule in ignored)


def test_what_is_copied_is_enough_to_install_the_project(tmp_path: Path) -> None:
    for source in copied():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, tmp_path / source)
    command = [
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "--no-index",
        ".",
    ]
    subprocess.run([sys.executable, "-m", "pip", *command], cwd=tmp_path, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    ours = {
        str(f.relative_to(ROOT)) for p in ("pipeline", "models", "jobs", "cluster") for f in (ROOT / p).rglob("*.py")
    }
    ours |= {str(f.relative_to(ROOT)) for f in (ROOT / "pipeline/presets").iterdir()}
    assert ours <= inside
