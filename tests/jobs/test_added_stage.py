"""A stage is one file in an installed package: every command finds it, and no file of ours names it.

The stage is that of ``examples/add_stage.py``.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster.package import make_package
from pipeline.build import all_stages
from pipeline.config import load_config, make_config
from pipeline.data.codec.stage import CODEC
from pipeline.data.source.journal import EMPTY
from pipeline.errors import UserError
from pipeline.graph.artifacts import load_artifact, read_shards, read_table
from pipeline.plugins import plugins
from pipeline.schema import schema
from pipeline.store import open_store
from pipeline.store.records import blob_path
from tests.chain import ROOT, Finished, done, unclip, write_config, write_list
from tests.plugin import install, run_with
from tests.seaweed import Server

GROUP = "unclip.stages"
EXAMPLE = (ROOT / "examples/add_stage.py").read_text()
LEAST: dict[str, Any] = {"project": "p", "store": "s", "source": {"paths": ["a.csv"]}}
SIDE = 32


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a package with the example's stage is installed."""
    return install(tmp_path_factory.mktemp("site"), GROUP, "brightness", "add_stage:BRIGHTNESS", EXAMPLE)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, pictures: str) -> Path:
    """A configuration of twenty rows and of the stage, whose store is a folder."""
    folder = tmp_path_factory.mktemp("added")
    rows = [write_list(folder / "list.csv", 0, 20)]
    path = write_config(folder, str(folder / "store"), pictures, rows, brightness={"side": SIDE})
    values = yaml.safe_load(path.read_text())
    values["run"]["brightness"] = {"workers": 0}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Puts a folder on this process's path while a test runs."""
    plugins.cache_clear()
    yield monkeypatch.syspath_prepend
    plugins.cache_clear()


def with_it(site: Path, *words: object, **changed: str) -> Finished:
    """Runs a command in a process of its own, where the package is installed."""
    return unclip(*words, env={"PYTHONPATH": f"{ROOT}{os.pathsep}{site}"} | changed)


@pytest.mark.slow
def test_it_is_probed_checked_and_goes_into_a_rayjob(site: Path, config: Path, s3: Server) -> None:
    probed = done(with_it(site, "plan", config, "--probe"))
    assert re.search(r"^ +brightness +stale .*, about [0-9.]+ m?s$", probed, re.MULTILINE)  # and not "(a guess)"
    assert "problems: 0" in with_it(site, "doctor", config).stdout
    there = (f"store={s3.url}/added", "run.kubernetes.image=image", "run.kubernetes.secret=keys")
    elsewhere = s3.endpoint.replace("127.0.0.1", "127.1")  # another name, for one that says loopback is refused
    words = ("submit", config, *there, "--to", "kuberay", "--until", "brightness")
    assert "--until=brightness" in done(with_it(site, *words, AWS_ENDPOINT_URL=elsewhere))


def test_every_command_finds_it(site: Path, config: Path) -> None:
    until = ("--until", "brightness")
    said = done(run_with(site, "run", config, *until))
    assert "\n  brightness " in said  # in the plan
    assert "\nbrightness " in said  # in the table at the end
    values = yaml.safe_load(config.read_text())
    store = open_store(values["store"])
    (record,) = store.list("artifacts/brightness/")
    key = record.path.rpartition("/")[2].removesuffix(".json")
    made = load_artifact(store, "brightness", key)
    assert made is not None
    assert made.recipe == {"side": SIDE}
    shards = list(read_shards(store, made))
    assert made.ledger.kept == sum(read_table(store, shard.blobs["brightness"]).num_rows for shard in shards) > 0

    assert "nothing to do" in done(run_with(site, "run", config, *until))
    assert key[:12] in done(run_with(site, "show", config, key[:12]))
    page = (Path(values["run"]["output"]) / "report.html").read_text()
    assert "<td>darkest</td>" in page.partition('<section id="stage-brightness">')[2]

    (Path(values["store"]) / blob_path(shards[0].blobs["brightness"])).unlink()
    assert "remakes what is lost of brightness" in done(run_with(site, "data", "check", config, "--repair"))
    assert "brightness done" in done(run_with(site, "run", config, *until))


def test_a_job_takes_it_along(site: Path, config: Path, path: Callable[[Path], None], tmp_path: Path) -> None:
    path(site)
    package = make_package(load_config(config), "file:///elsewhere", "out", EMPTY)
    for name in ("add_stage.py", "add_stage-of-mine-1.0.dist-info/entry_points.txt"):
        file = package.files[name]
        content = file if isinstance(file, bytes) else file.read_bytes()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    planned = done(with_it(tmp_path, "run", config, "--dry-run", "--until", "brightness"))
    assert "\n  brightness " in planned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"brightness": {"side": "wide"}}, "brightness.side: expected a whole number, got 'wide'"),
        ({"brightness": {"sid": 8}}, "brightness.sid: unknown key; did you mean side?"),
        ({"brigthness": {}}, "brigthness: unknown key; did you mean brightness?"),
        ({"run": {"brightness": {"worker": 1}}}, "run.brightness.worker: unknown key; did you mean workers?"),
    ],
)
def test_its_section_is_checked_as_ours_are(
    site: Path, path: Callable[[Path], None], changes: dict[str, Any], message: str
) -> None:
    path(site)
    with pytest.raises(UserError) as caught:
        make_config({**LEAST, **changes})
    assert str(caught.value) == message
    [_] = Draft202012Validator(schema()).iter_errors({**LEAST, **changes})
    assert not list(Draft202012Validator(schema()).iter_errors({**LEAST, "brightness": {"side": 8}}))


PARTS = """
from dataclasses import dataclass
from unclip.stages import Stage

@dataclass(frozen=True)
class Recipe:
    side: int = 8

"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("MINE = 7", "it is not an unclip.stages.Stage"),
        ('MINE = Stage("other", 1, Recipe, (), print)', "it declares the stage other, and both need one name"),
        ('MINE = Stage("mine", 1, Recipe(), (), print)', "its recipe is not a dataclass"),
        ('MINE = Stage("mine", 1, Recipe, ("pears",), print)', "it reads pears, which no stage makes; did you mean pa"),
        ('MINE = Stage("mine", 1, Recipe, (), print, "source")', "the source is one stage"),
    ],
)
def test_a_broken_one_is_named(tmp_path: Path, path: Callable[[Path], None], code: str, message: str) -> None:
    module = f"broken_{abs(hash(code))}"
    path(install(tmp_path, GROUP, "mine", f"{module}:MINE", PARTS + code))
    with pytest.raises(UserError) as caught:
        make_config(LEAST)
    said = str(caught.value)
    assert said.startswith(f"stage mine ({module}:MINE) cannot be used: {message}")
    assert said.endswith(f"; correct or uninstall {module}-of-mine")


def test_stages_given_to_a_program_are_checked_too() -> None:
    mine = replace(CODEC, name="mine", inputs=("yours",))
    yours = replace(CODEC, name="yours", inputs=("pairs",))
    assert [stage.name for stage in all_stages([mine, yours])][-2:] == ["yours", "mine"]
    with pytest.raises(UserError, match=r"^stage mine: it reads yours, which no stage makes"):
        all_stages([mine])
    for name in ("codec", "release", "ray"):
        with pytest.raises(UserError, match=f"^stage {name}: "):
            make_config(LEAST, all_stages([replace(CODEC, name=name)]))
