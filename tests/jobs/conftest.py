import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from jobs.bundles import remember_bundle
from jobs.cli import main
from pipeline.data.source import reader
from pipeline.store import open_store
from tests.faults import Undisturbed, run_undisturbed
from tests.jobs.releases import Made, project_in
from tests.pipeline.sampling.bundles import publish_bundle
from tests.reader_thread import IN_A_THREAD


@pytest.fixture(scope="module", autouse=True)
def _lists_are_read_in_a_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hundreds of commands of these tests need no child for each list, except where lists are a stranger's."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_foreign_lists.py":
            patch.setattr(reader, "subprocess", IN_A_THREAD)
        yield


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pictures: str) -> Undisturbed:
    """Runs that nothing disturbed, for the tests of crashes, races and damage to compare with.

    The first process to come by makes them for all of pytest's; nobody writes to them.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own) / "undisturbed"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            folder.mkdir()
            run_undisturbed(folder, pictures)
            (folder / "made").touch()
    return Undisturbed(folder, pictures)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle of random weights, in a store and as a folder."""
    folder = tmp_path_factory.mktemp("published")
    publish_bundle(folder)
    return folder


@pytest.fixture
def run(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output folder of a run, out/nano in the current folder, with the store in it; beside it ``a bundle``."""
    shutil.copytree(published / "store", tmp_path / "out/nano/store")
    shutil.copytree(published / "bundle", tmp_path / "a bundle")
    remember_bundle(tmp_path / "out/nano", str(tmp_path / "out/nano/store"), "b" * 64)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.sampling.drawing.cores", torch.get_num_threads)
    return tmp_path / "out/nano"


@pytest.fixture
def draw(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[Path]]:
    """Runs a command that draws small images in a few steps, and returns the files that it names."""

    def draw(*words: object) -> list[Path]:
        capsys.readouterr()
        few = ("--set", "size=64", "--set", "decoder_steps=2", "--set", "prior_steps=2")
        assert main([*map(str, words), *few]) == 0
        return [Path(line) for line in capsys.readouterr().out.splitlines()]

    return draw


@pytest.fixture
def made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Made:
    """A project in a folder."""
    return project_in(open_store(str(tmp_path / "store")), tmp_path, capsys)
