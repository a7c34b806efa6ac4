"""What cluster/Dockerfile says."""

import re
import shlex
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TEXT = re.sub(r"\\\n\s*", " ", (ROOT / "cluster/Dockerfile").read_text())
INSTRUCTIONS = [line.partition(" ")[::2] for line in TEXT.splitlines() if line and not line.startswith("#")]


def words(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def copied() -> list[str]:
    return [source for rest in words("COPY") for source in shlex.split(rest)[:-1]]
