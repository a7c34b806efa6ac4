"""A metric is one file of an installed package: a run measures it, and a release is judged by it.

The metric is that of ``examples/add_metric.py``.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jobs.project import open_project
from pipeline.plugins import plugins
from pipeline.store.records import read_blob
from tests.chain import ROOT, done, here, keys, open_at
from tests.jobs.pages import small
from tests.pipeline.data.bench import picture, write_listed
from tests.plugin import install

SENTENCE = "Drawn images are as colourful as their real images"
EXAMPLE = (ROOT / "examples/add_metric.py").read_text()
DISTANCE = "(made - real).abs(),"


@pytest.fixture(autouse=True)
def found_again() -> Iterator[None]:
    """Plug-ins are looked for once a process."""
    yield
    plugins.cache_clear()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A project of thirty images of its own, ten of them held out."""
    splits = ["test" if i % 3 == 2 else "train" for i in range(30)]
    listed = write_listed(tmp_path, [picture(i) for i in range(30)], splits)
    values = small({"project": "own", "store": str(tmp_path / "store"), "source": {"paths": [listed]}})
    values["run"]["output"] = str(tmp_path / "out")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "own.yaml"


def test_a_run_the_report_and_a_release_have_it(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = config.parent
    before = done(here("run", config, "--until", "evaluation", cwd=folder))
    assert "Does it learn?" in before
    assert SENTENCE not in before
    store = open_at(folder / "store")
    made = keys(store)

    # The second bundle's images are made worse where they are measured.
    assert EXAMPLE.count(DISTANCE) == 1
    code = EXAMPLE.replace(DISTANCE, f"{DISTANCE[:-1]} + float(__import__('os').environ.get('WORSE', 0)),")
    site = install(folder / "site", "unclip.metrics", "colourfulness", "add_metric:COLOURFULNESS", code)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "add_metric", raising=False)
    plugins.cache_clear()
    said = done(here("run", config, "--until", "evaluation", cwd=folder))
    assert SENTENCE in said.partition("Does it learn?")[2]
    assert {stage for stage, found in keys(store).items() if found != made[stage]} == {"evaluation"}
    assert SENTENCE in (folder / "out/report.html").read_text()
    told = json.loads((folder / "out/report.json").read_text())["figures"]
    assert {figure["model"] for figure in told if figure["claim"] == "colourfulness"} == {
        "ar_prior", "diffusion_prior", "decoder",
    }  # fmt: skip
    artifact = open_project(str(config), ()).finished()["evaluation"]
    document = json.loads(read_blob(store, artifact.blobs["evaluation.json"]))
    assert "colourfulness" in {figure["claim"] for figure in document["figures"]}

    done(here("release", "promote", config, cwd=folder))
    done(here("run", config, "decoder.seed=5", "--until", "evaluation", cwd=folder, env={"WORSE": "50"}))
    judged = here("release", "promote", config, "--set", "decoder.seed=5", cwd=folder)
    assert judged.returncode == 1
    assert "  decoder.colourfulness is worse: " in judged.stdout
    assert "  ar_prior.colourfulness is worse: " in judged.stdout
