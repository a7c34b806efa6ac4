"""A stage is one module and one line of ``build``: every command finds it, and no other file has to name it.

The stage is that of ``examples/add_stage.py``.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.graph.artifacts import load_artifact, read_shards, read_table
from pipeline.store import open_store
from pipeline.store.records import blob_path
from tests.chain import ROOT, Finished, done, write_config, write_list
from tests.seaweed import Server

LINE = "    SAMPLES,\n"


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with the module of the example's stage, and its line in ``build``."""
    folder = tmp_path_factory.mktemp("code")
    for name in ("unclip", "pipeline", "models", "jobs", "cluster", "serve"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "examples/add_stage.py", folder / "pipeline/data/brightness.py")
    build = folder / "pipeline/build.py"
    text = build.read_text()
    assert text.count(LINE) == 1
    text = text.replace(LINE, f"    BRIGHTNESS,\n{LINE}")
    first = "from pipeline.data.source.stage import"
    build.write_text(text.replace(first, f"from pipeline.data.brightness import BRIGHTNESS\n{first}", 1))
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, pictures: str) -> Path:
    """A configuration of twenty rows, whose store is a folder."""
    folder = tmp_path_factory.mktemp("added")
    return write_config(folder, str(folder / "store"), pictures, [write_list(folder / "list.csv", 0, 20)])


@pytest.mark.slow
def test_it_is_probed_checked_and_goes_into_a_rayjob(code: Path, config: Path, s3: Server) -> None:
    probed = done(unclip(code, "plan", config, "--probe"))
    assert re.search(r"^ +brightness +stale .*, about [0-9.]+ m?s$", probed, re.MULTILINE)  # and not "(a guess)"
    assert "problems: 0" in unclip(code, "doctor", config).stdout
    there = (f"store={s3.url}/added", "run.kubernetes.image=image", "run.kubernetes.secret=keys")
    elsewhere = s3.endpoint.replace("127.0.0.1", "127.1")  # another name, for one that says loopback is refused
    words = ("submit", config, *there, "--to", "kuberay", "--until", "brightness")
    assert "--until=brightness" in done(unclip(code, *words, AWS_ENDPOINT_URL=elsewhere))


def unclip(code: Path, *words: object, **changed: str) -> Finished:
    """Runs a command of the copy."""
    command = [sys.executable, "-m", "jobs.cli", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(code)} | changed
    return subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, timeout=240)


def test_every_command_finds_it(code: Path, config: Path) -> None:
    until = ("--until", "brightness", "run.brightness.workers=0")
    said = done(unclip(code, "run", config, *until))
    assert "\n  brightness " in said  # in the plan
    assert "\nbrightness " in said  # in the table at the end
    values = yaml.safe_load(config.read_text())
    store = open_store(values["store"])
    (record,) = store.list("artifacts/brightness/")
    key = record.path.rpartition("/")[2].removesuffix(".json")
    made = load_artifact(store, "brightness", key)
    assert made is not None
    shards = list(read_shards(store, made))
    assert made.ledger.kept == sum(read_table(store, shard.blobs["brightness"]).num_rows for shard in shards) > 0

    assert "nothing to do" in done(unclip(code, "run", config, *until))
    assert key[:12] in done(unclip(code, "show", config, key[:12]))
    assert "brightness" in (Path(values["run"]["output"]) / "report.html").read_text()

    (Path(values["store"]) / blob_path(shards[0].blobs["brightness"])).unlink()
    store.delete([record.path])  # so that it is made from its shards again, and finds that one is gone
    healed = unclip(code, "run", config, *until)
    assert "brightness done" in done(healed)
