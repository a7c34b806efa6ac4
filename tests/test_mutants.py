"""The tool that tests the tests."""

import subprocess
import sys

import pytest

from tests.mutants import ROOT, files_of_tests, mutants


def test_operators_numbers_branches_calls_and_their_arguments_are_changed_one_at_a_time() -> None:
    source = (
        "def f(a, b):\n    return g(a, b) if a < 2 else (-b).abs()\n\nclass C:\n    def m(self):\n        return 1\n"
    )
    found = {(each.function, each.change.partition("  ->  ")[2]) for each in mutants(source)}
    assert found == {
        ("f", "(-b).abs() if a < 2 else g(a, b)"),
        ("f", "g(b, a) if a < 2 else (-b).abs()"),
        ("f", "g(a, b) if a < 2 else -b"),
        ("f", "a >= 2"),
        ("f", "a < 3"),
        ("f", "b.abs"),
        ("C.m", "2"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("file", ["models/diffusion/process.py", "models/codec.py"])
def test_nine_of_ten_faults_in_the_mathematics_are_noticed(file: str) -> None:
    command = [sys.executable, "-m", "tests.mutants", file]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    noticed, of = (int(word) for word in said.splitlines()[-1].split()[1::2][:2])
    assert files_of_tests(file)
    assert noticed >= 0.9 * of, said
