"""Metrics of installed packages: found by their entry points, part of the key, and named where they are broken."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.build import build
from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.evaluate.metric import with_metrics
from pipeline.evaluate.recipe import EvaluationRecipe
from pipeline.evaluate.run import metrics
from pipeline.evaluate.stage import run_evaluation
from pipeline.graph.stages import stage_key
from pipeline.plugins import plugins
from tests import plugin
from tests.chain import ROOT
from tests.pipeline.evaluate.made_up import RECIPE, Case

MINIMAL = """
from unclip.metrics import Metric
MINE = Metric("mine", "It is mine.", ("decoder",), ("drawn", "images"), {measure})
"""
PRINTS = MINIMAL.format(measure="print")


def install(folder: Path, name: str = "colourfulness", value: str = "add_metric:COLOURFULNESS", code: str = "") -> None:
    """Installs the example's metric, or that of ``code``."""
    plugin.install(folder, "unclip.metrics", name, value, code or (ROOT / "examples/add_metric.py").read_text())
    plugins.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, whose modules are forgotten in the end."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in ("add_metric", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    plugins.cache_clear()
    yield tmp_path / "site"
    plugins.cache_clear()


def test_it_makes_the_evaluation_stale_and_nothing_else(folder: Path) -> None:
    def keys() -> dict[str, str]:
        found: dict[str, str] = {}
        for name, stage in build(load_config(ROOT / "configs/nano.yaml")).items():
            found[name] = stage_key(stage, found)
        return found

    none = keys()
    assert with_metrics(EvaluationRecipe()) == EvaluationRecipe()
    install(folder)
    one = keys()
    assert {name for name in none if none[name] != one[name]} == {"evaluation"}
    source = (folder / "add_metric.py").read_text()
    (folder / "add_metric.py").write_text(source.replace("together=True,", "together=True,\n    version=2,"))
    del sys.modules["add_metric"]
    plugins.cache_clear()
    assert keys()["evaluation"] not in (none["evaluation"], one["evaluation"])
    assert asdict(with_metrics(EvaluationRecipe(rows=9)))["rows"] == 9


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("", "AttributeError: module 'broken' has no attribute 'MINE'"),
        ("MINE = 3", "it is not an unclip.metrics.Metric"),
        (
            MINIMAL.format(measure="print").replace('"decoder"', '"decodr"'),
            "decodr is none of its possible models; did you mean decoder",
        ),
        (PRINTS.replace('"drawn"', '"drawings"'), "drawings is none of its possible needs"),
        (PRINTS.replace('"drawn"', '"samples"'), "it needs samples of models other than"),
    ],
)
def test_a_broken_package_is_named_in_one_sentence(folder: Path, code: str, why: str) -> None:
    install(folder, "mine", "broken:MINE", code or "# nothing")
    with pytest.raises(UserError) as refused:
        build(load_config(ROOT / "configs/nano.yaml"))
    said = str(refused.value)
    assert said.startswith(f"metric mine (broken:MINE) cannot be used: {why}")
    assert said.endswith("; correct or uninstall broken-of-mine")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("measure", "why"),
    [
        ("lambda subject, drawn, rows: drawn + 'x'", "it fails for decoder: TypeError: "),
        ("lambda subject, drawn, rows: None", "it fails for decoder: TypeError: "),
        ("lambda subject, drawn, rows: [3]", "it fails for decoder: TypeError: it returns 3, no Figure;"),
        (
            "lambda subject, drawn, rows: [subject.figure('one'), subject.figure('one')]",
            "its figure decoder.one has the name of another metric's",
        ),
    ],
)
def test_a_metric_that_fails_is_named_in_one_sentence(
    case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, measure: str, why: str
) -> None:
    monkeypatch.setattr("pipeline.evaluate.run.OURS", ())  # which would be measured first
    install(folder, "mine", "broken:MINE", MINIMAL.format(measure=measure))
    with pytest.raises(UserError) as refused:
        run_evaluation(case.context(with_metrics(RECIPE)))
    assert str(refused.value).startswith(f"metric mine (broken:MINE) cannot be used: {why}")
    assert "\n" not in str(refused.value)


def test_where_it_runs_the_same_metrics_are_needed(case: Case, folder: Path) -> None:
    planned = case.context()
    install(folder)
    with pytest.raises(UserError, match="planned with the plug-in metrics none, but here are colourfulness 1; install"):
        run_evaluation(planned)


def test_a_name_of_ours_is_taken(folder: Path) -> None:
    install(folder, "psnr", "broken:MINE", PRINTS.replace('"mine"', '"psnr"'))
    with pytest.raises(UserError, match=r"metric psnr \(broken:MINE\) cannot be used: its name is taken;"):
        metrics()
