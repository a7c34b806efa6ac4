"""The wheel and the source distribution of a commit: the same bytes whoever builds them, whole, and enough to run."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from PIL import Image

from tests.chain import MICRO, ROOT
from tests.cluster.dockerfile import PROJECT, copied
from tests.dist import build, git, unpack_commit

pytestmark = pytest.mark.slow
VERSION = PROJECT["project"]["version"]
PACKAGES = ("unclip", "pipeline", "models", "jobs", "cluster", "serve")
# What a run of minutes is cut to: how well these models draw is not the question here.
SHORT = {name: MICRO[name] for name in (*(name for name in MICRO if "samples" in MICRO[name]), "bundle", "evaluation")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_commit(tmp_path_factory.mktemp("commit") / "source")


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(source, tmp_path_factory.mktemp("built"))


def test_a_second_build_elsewhere_is_the_same_bytes(built: dict[str, Path], tmp_path: Path) -> None:
    """In a folder with another name and with other rights, in another zone, with another language and random hashes."""
    again = unpack_commit(tmp_path / "again")
    for file in again.rglob("*"):
        file.chmod(0o700 if file.is_dir() else file.stat().st_mode & 0o700)
        os.utime(file, (1e9, 1e9))
    other = {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    for suffix, file in build(again, tmp_path / "built", env=other).items():
        assert file.name == built[suffix].name
        assert file.read_bytes() == built[suffix].read_bytes()


def test_the_source_distribution_and_what_docker_copies_make_the_same_wheel(
    built: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    with tarfile.open(built[".gz"]) as tar:
        tar.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    context = tmp_path / "context"
    for name in copied():
        if (source / name).is_dir():
            shutil.copytree(source / name, context / name)
        else:
            context.mkdir(exist_ok=True)
            shutil.copy(source / name, context / name)
    for folder in (unpacked, context):
        wheel = build(folder, tmp_path / f"of-{folder.name}", "--target", "wheel")[".whl"]
        assert wheel.read_bytes() == built[".whl"].read_bytes()


def test_the_wheel_holds_every_file_of_its_packages_and_nothing_else(built: dict[str, Path]) -> None:
    tracked = git("ls-tree", "-r", "--name-only", "HEAD", *PACKAGES).splitlines()
    moved = git("ls-tree", "-r", "--name-only", "HEAD", "configs", "docs").splitlines()
    moved = [name for name in moved if not name.startswith("docs/images/")]
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = wheel.namelist()
        about = f"unclip_ray-{VERSION}.dist-info"
        metadata = HeaderParser().parsestr(wheel.read(f"{about}/METADATA").decode())
        scripts = wheel.read(f"{about}/entry_points.txt").decode()
    ours = [name for name in names if not name.startswith(f"{about}/")]
    assert sorted(ours) == sorted([*tracked, *(f"pipeline/{name}" for name in moved)])
    assert f"{about}/licenses/LICENSE" in names
    assert (metadata["Name"], metadata["Version"]) == ("unclip-ray", VERSION)
    assert scripts.split() == ["[console_scripts]", "unclip", "=", "jobs.cli:main"]


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and, by a path, the packages that this one has; but nothing of the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(built[".whl"])], check=True)
    site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # A path that a .pth file adds is searched last, and the .pth files in it, such as the checkout's, are not read.
    here = dict.fromkeys(path for path in sys.path if path.endswith("-packages"))
    Path(site, "packages.pth").write_text("".join(f"{path}\n" for path in here))
    # As the package of that name that img2dataset brings: it breaks every process that looks there before the library.
    Path(site, "dataclasses.py").write_text("raise ImportError('this is not the standard library')\n")
    return folder / "bin"


def test_what_is_installed_runs_the_quick_start_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def said(program: str, *words: str) -> str:
        command = [installed / program, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert said("unclip", "--version") == f"unclip {VERSION}\n"
    place = said("python", "-c", "import jobs, unclip; print(unclip.__version__, jobs.__file__)").split()
    assert place[0] == VERSION
    assert not Path(place[1]).is_relative_to(ROOT)

    short = [f"{name}={json.dumps(value, separators=(',', ':'))}" for name, value in SHORT.items()]
    assert "nano: 320 pairs" in said("unclip", "peek", "--dry-run")
    said("unclip", "peek", *short)
    (sample,) = tmp_path.glob("out/nano/samples/????.png")
    assert Image.open(sample).size == (1024, 1024)
    assert (tmp_path / "out/nano/report.html").is_file()
    assert "nothing to do" in said("unclip", "run", "nano", *short)
    drawn = said("unclip", "sample", "a square yellow monster", "size=64").splitlines()
    assert Image.open(tmp_path / drawn[0]).size == (64, 64)
    code = "import unclip; print(unclip.load().generate('a monster', size=64, progress=False).size)"
    assert said("python", "-c", code) == "(64, 64)\n"

    for i in range(9):
        Image.new("RGB", (80, 80), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "pairs.csv").write_text("url,caption\n" + "".join(f"{i}.png,monster {i}\n" for i in range(9)))
    said("unclip", "init", "mine", "pairs.csv")
    first = (tmp_path / "mine.yaml").read_text().partition("\n")[0]
    assert "DecoderRecipe" in json.loads(Path(first.partition("$schema=")[2]).read_text())["$defs"]
    code = (
        "from cluster.package import make_package; from pipeline.config import load_config;"
        "from pipeline.data.source.journal import EMPTY; nano = load_config('nano');"
        "print(*make_package(nano, 's3://bucket/nano', 'out', EMPTY).files, sep='\\n')"
    )
    sent = set(said("python", "-c", code).split("\n"))
    assert {"pipeline/presets/nano.yaml", "serve/studio/index.html", "jobs/cli.py", "project.yaml"} <= sent


def test_mypy_finds_the_wrong_names_in_a_program_of_a_user(installed: Path, tmp_path: Path) -> None:
    """Under --strict, far from the checkout: no error, and a mistake that is not found has a comment too many."""
    lines = (ROOT / "tests/typed_program.py").read_text().splitlines(keepends=True)
    (tmp_path / "program.py").write_text("".join(line for line in lines if not line.startswith("# mypy:")))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    command = [installed / "python", "-m", "mypy", "--strict", "program.py"]
    checked = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert checked.stdout == "Success: no issues found in 1 source file\n", checked.stdout + checked.stderr
