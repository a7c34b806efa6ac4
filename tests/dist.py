"""``python -m tests.dist FOLDER``: builds the wheel and the source distribution of the commit that is checked out."""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from tests.chain import ROOT


def git(*words: str) -> str:
    """Returns what git says."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def commit_time() -> str:
    """Returns the time of the commit in seconds, which every file of an archive gets."""
    return git("log", "-1", "--format=%ct")


def unpack_commit(folder: Path) -> Path:
    """Writes the files of the commit into a new folder, which it returns."""
    archive = folder.with_suffix(".tar")
    git("archive", "--output", str(archive), "HEAD")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    return folder


def build(source: Path, target: Path, *words: str, env: Mapping[str, str] | None = None) -> dict[str, Path]:
    """Builds what ``words`` of hatchling's name, by default both, and returns the files by their suffixes."""
    environment = os.environ | {"SOURCE_DATE_EPOCH": commit_time()} | dict(env or {})
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(target.absolute()), *words]
    subprocess.run(command, cwd=source, env=environment, check=True, stdout=subprocess.DEVNULL)
    return {file.suffix: file for file in sorted(target.iterdir())}


def main(target: Path) -> None:
    """Builds both into a folder, in place of what it holds."""
    shutil.rmtree(target, ignore_errors=True)
    source = unpack_commit(target.absolute().with_name(f"{target.name}-source"))
    try:
        for file in build(source, target).values():
            print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")
    finally:
        shutil.rmtree(source)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
