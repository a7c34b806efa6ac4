"""The Makefile builds the environment with a Python that runs, not with a name that is only found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chain import ROOT

SHIM = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"  # as pyenv puts on PATH for versions that it lacks


@pytest.mark.parametrize(("runs", "taken"), [("python3.12", "python3.12"), ("", "")])
def test_a_python_is_found_by_running_it(runs: str, taken: str, tmp_path: Path) -> None:
    for name in ("python3.11", "python3.12", "python3.13"):
        file = tmp_path / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n' if name == runs else SHIM)
        file.chmod(0o755)
    command = ["make", "--silent", "--file", str(ROOT / "Makefile"), "--eval", "show: ; @echo '$(PYTHON)'", "show"]
    # Without what make test-pythons hands down: PYTHON of the make that started this test.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "PYTHON")}
    environment["PATH"] = f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (said.stdout, said.stderr) == (f"{taken}\n", "")
