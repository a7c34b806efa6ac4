"""cluster/Dockerfile cannot be built here; what can be said without building it, and a linter does not say."""

import fnmatch
import re
import shlex

from packaging.specifiers import SpecifierSet

from tests.cluster.dockerfile import INSTRUCTIONS, PROJECT, ROOT, TEXT, copied, words


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


def test_versions_are_those_of_the_lock() -> None:
    installs = [command for command in words("RUN") if "pip install" in command]
    assert [shlex.split(command)[-1] for command in installs] == ["torchvision", ".[${EXTRAS}]"]
    assert all("--constraint requirements.lock" in command for command in installs)


def test_the_variant_for_efa_brings_no_other_code_and_ends_as_the_same_user() -> None:
    text = re.sub(r"\\\n\s*", " ", (ROOT / "cluster/efa.Dockerfile").read_text())
    lines = [line.partition(" ")[::2] for line in text.splitlines() if line and not line.startswith("#")]
    assert [rest for name, rest in lines if name in ("FROM", "ADD", "COPY")] == [
        "${IMAGE}", "aws-efa-installer-*.tar.gz ./",
    ]  # fmt: skip
    assert "://" not in text
    assert [rest for name, rest in lines if name in ("USER", "WORKDIR")][-2:] == ["1000", "/home/unclip"]


def test_only_what_is_copied_gets_into_the_context() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert [rule[1:] for rule in rules if rule.startswith("!")] == copied()
    assert all((ROOT / source).exists() for source in copied())
    ignored = [rule for rule in rules[1:] if not rule.startswith("!")]
    assert any(fnmatch.fnmatch("pipeline/__pycache__", rule.replace("**/", "*")) for rule in ignored)


def test_what_the_wheel_is_made_of_is_copied() -> None:
    """That it makes the same wheel is tested by make dist."""
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert {*packages, "pyproject.toml", PROJECT["project"]["readme"], "LICENSE"} <= set(copied())
