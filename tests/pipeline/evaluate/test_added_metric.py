"""Metrics of installed packages: found by their entry points, part of the key, and named where they are broken."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from pipeline.build import build
from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.evaluate.figure import as_text
from pipeline.evaluate.metric import metrics_of_users, with_metrics
from pipeline.evaluate.recipe import EvaluationRecipe
from pipeline.evaluate.run import OURS, metrics
from pipeline.evaluate.stage import run_evaluation
from pipeline.graph.stages import stage_key
from pipeline.plugins import plugins
from pipeline.release.compare import changes, load_measured
from pipeline.release.gates import failing
from pipeline.report.evaluation import evaluation_section
from pipeline.report.inputs import ReportInput
from pipeline.settings import ReleaseGates
from tests import plugin
from tests.chain import ROOT
from tests.pipeline.evaluate.made_up import normal, rows, subject
from tests.pipeline.evaluate.test_stage import RECIPE, Case, few_threads, make_case  # noqa: F401  # a fixture of its own

SENTENCE = "Drawn images are as colourful as their real images: nearer to them than to another row's"
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


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case"), 4, 20, 72, ("diffusion",))


def test_its_claim_stands_beside_ours_everywhere(case: Case, folder: Path) -> None:
    before = run_evaluation(case.context())
    install(folder)
    ctx = case.context(with_metrics(RECIPE))
    assert ctx.key != case.context().key
    made = run_evaluation(ctx)
    assert f" {SENTENCE}" in as_text(made.metrics["figures"])
    section = evaluation_section(ReportInput(case.world.store, {"evaluation": made}))
    assert SENTENCE.replace("'", "&#39;") in section
    document = case.document(made)
    assert document["recipe"]["metrics"] == ["colourfulness 1"]
    own = [figure for figure in document["figures"] if figure["claim"] == "colourfulness"]
    assert [figure["model"] for figure in own] == ["diffusion_prior", "decoder"]
    assert all(len(figure["values"]) == figure["rows"] == 9 for figure in own)
    ours = [figure for figure in document["figures"] if figure["claim"] != "colourfulness"]
    assert ours == case.document(before)["figures"]
    measured = load_measured(case.world.store, made)
    assert measured is not None
    worse = json.loads(json.dumps(measured.document))
    for figure in worse["figures"]:
        if figure["claim"] == "colourfulness":
            figure["values"] = [value + 1 for value in figure["values"]]
    later = replace(measured, document=worse)
    lines = failing(ReleaseGates(), measured.figures, later.figures, changes(measured, later))
    assert [line.partition(" is worse: ")[0] for line in lines] == [
        "diffusion_prior.colourfulness", "decoder.colourfulness",
    ]  # fmt: skip


def test_what_ignores_the_caption_is_not_as_colourful(folder: Path) -> None:
    install(folder)
    (metric,) = metrics_of_users()
    real = (normal(40, 3, 8, 8) * torch.linspace(5, 60, 40).view(-1, 1, 1, 1) + 128).clamp(0, 255).to(torch.uint8)
    drawn = real.permute(0, 2, 3, 1)
    found = {
        name: next(iter(metric.measure(subject(metric, "decoder"), images, rows(40, image=real)))).holds
        for name, images in (("right", drawn), ("grey", drawn[:, :, :, :1].expand(-1, -1, -1, 3)), ("one", drawn[:1]))
    }
    assert found == {"right": True, "grey": False, "one": False}


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
            "lambda subject, drawn, rows: [subject.figure('condition')]",
            "its figure decoder.condition has the name of another metric's",
        ),
    ],
)
def test_a_metric_that_fails_is_named_in_one_sentence(case: Case, folder: Path, measure: str, why: str) -> None:
    install(folder, "mine", "broken:MINE", MINIMAL.format(measure=measure))
    with pytest.raises(UserError) as refused:
        run_evaluation(case.context(with_metrics(RECIPE)))
    assert str(refused.value).startswith(f"metric mine (broken:MINE) cannot be used: {why}")
    assert "\n" not in str(refused.value)


def test_where_it_runs_the_same_metrics_are_needed(case: Case, folder: Path) -> None:
    planned = case.context()
    install(folder)
    with pytest.raises(
        UserError, match="planned with the metrics none of users, and here are colourfulness 1; install"
    ):
        run_evaluation(planned)


def test_a_name_of_ours_is_taken(case: Case, folder: Path) -> None:
    install(folder, "psnr", "broken:MINE", PRINTS.replace('"mine"', '"psnr"'))
    with pytest.raises(UserError, match=r"metric psnr \(broken:MINE\) cannot be used: its name is taken;"):
        run_evaluation(case.context(with_metrics(RECIPE)))


def test_our_metrics_have_names_and_sentences_of_their_own() -> None:
    assert metrics() == OURS
    assert len({metric.name for metric in OURS}) == len({metric.text for metric in OURS}) == len(OURS)
    assert all(("{model}" in metric.text) != metric.together for metric in OURS)
