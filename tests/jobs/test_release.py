"""``unclip release`` on made-up artefacts of a small configuration. On S3: test_security.py."""

import json
from pathlib import Path

import pytest
import yaml

import jobs.release
from jobs.cli import main
from jobs.project import open_project
from models.sampling_config import MODELS
from pipeline.graph.artifacts import Artifact, artifact_path, load_artifact, publish_artifact
from pipeline.graph.keys import flatten
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.release.pointer import release_path
from pipeline.report.comparison import comparison_section
from pipeline.report.inputs import ReportInput
from pipeline.store.records import blob_path, put_blob
from tests.chain import refused
from tests.jobs.releases import DATA, FEW, LATER, OTHER, Made


def test_before_anything_is_made_or_released(made: Made) -> None:
    assert "make them with unclip run --until evaluation" in made.release("promote", code=2)
    assert "nothing has been released" in made.release("list")
    assert "no release exists before the first" in made.release("rollback", code=2)
    assert "no current release exists yet" in made.release("diff", code=2)
    assert "no current release exists yet" in made.release("take", "folder", code=2)
    assert "nothing has been released yet" in made.release("evaluate", code=2)
    assert list(made.store.list("")) == []


def test_a_better_bundle_is_promoted_and_rolled_back(made: Made) -> None:
    first, better = made.make(0.0), made.make(0.1, OTHER)
    made.release("promote")
    assert f"p: {first[:12]} is the release already" in made.release("promote")
    assert f"p: {better[:12]} is the release, which was {first[:12]}" in made.release("promote", *LATER)
    assert made.current == better
    assert [move.failed for move in made.releases.moves] == [(), ()]

    found = json.loads(made.release("diff", "current", "previous", "--json"))
    assert (found["old"], found["new"], found["not_compared"]) == (better, first, None)
    assert found["recipe"] == ["decoder.weight_decay 0.02 -> 0.01"]
    assert {figure["verdict"] for figure in found["figures"]} >= {"worse"}

    assert f"p: {first[:12]} is the release again" in made.release("rollback", "--reason", "it drew cats")
    assert made.current == first
    assert "no release exists before this one" in made.release("rollback", code=2)
    listed = made.release("list")
    assert f"{first} is the release" in listed
    assert [line.split()[3] for line in listed.splitlines()[1:]] == ["promote", "promote", "rollback"]
    assert listed.rstrip().endswith("it drew cats")
    made.release("promote", *LATER)
    assert made.current == better


def test_a_worse_bundle_is_not_promoted_but_by_force_with_a_reason(made: Made) -> None:
    first, worse = made.make(0.1), made.make(0.0, OTHER, holds=False)
    made.release("promote")
    said = made.release("promote", *LATER, code=1)
    assert "decoder.top held for the release and fails now" in said
    assert "decoder.top is worse: " in said
    assert "--force REASON promotes it anyway" in said
    assert made.current == first
    assert "--force needs a reason" in made.release("promote", *LATER, "--force", " ", code=2)

    made.release("promote", *LATER, "--force", "the old one is too large")
    assert made.current == worse
    move = made.releases.moves[-1]
    assert move.reason == "the old one is too large"
    assert [line.split(":")[0] for line in move.failed] == [
        "decoder.top held for the release and fails now", "decoder.top is worse",
    ]  # fmt: skip
    assert "in spite of: decoder.top is worse" in made.release("list")


def test_of_too_few_rows_no_gate_is_passed_in_silence(made: Made) -> None:
    made.make(0.0, holds=None)
    made.release("promote")  # the first one has nothing to beat
    first = made.current
    worse = made.make(0.0, OTHER, holds=None)
    said = made.release("promote", *LATER, code=1)
    assert f"  no gate can be judged. Nothing was measured: {FEW}" in said
    assert f"  not judged: decoder.top: {FEW}" in said
    assert made.current == first
    made.release("promote", *LATER, "--force", "it looks better")
    assert made.current == worse
    assert made.releases.moves[-1].failed == (f"no gate can be judged. Nothing was measured: {FEW}",)


def test_gates_are_configured(made: Made) -> None:
    made.make(0.1)
    worse = made.make(0.0, OTHER)
    made.release("promote")
    made.release("promote", *LATER, code=1)
    made.release("promote", *LATER, "--set", "release.tolerance=0.01", code=1)
    made.release("promote", *LATER, "--set", "release.ignore=[decoder.top]")
    assert made.current == worse


def test_other_measurements_are_refused_and_the_release_is_measured_again(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made.make(0.1)
    made.release("promote")
    changed = (*LATER, "--set", "evaluation.rows=9")
    made.make(0.2, OTHER, "evaluation.rows=9")
    said = made.release("promote", *changed, code=1)
    assert "cannot be compared with the release: evaluation.rows 256 -> 9" in said
    assert "unclip release evaluate" in said
    assert "not compared: evaluation.rows 256 -> 9" in made.release("diff", *changed)
    assert made.current == first

    asked = []

    def run(ctx: Context) -> Artifact:
        asked.append((ctx.inputs["bundle"].key, ctx.recipe.rows))
        own = next(iter(jobs.release.evaluations(made.store, first)))
        document = {**own.document, "recipe": flatten(ctx.recipe)}
        blobs = {"evaluation.json": put_blob(made.store, json.dumps(document).encode())}
        return publish_artifact(made.store, ctx.publishable(blobs=blobs, ledger=Ledger()), 0.0)

    monkeypatch.setattr("pipeline.evaluate.run.evaluate", run)
    for _ in range(2):  # again there is nothing to do
        assert "is measured on the rows of" in made.release("evaluate", *changed)
    assert asked == [(first, 9)]
    made.release("promote", *changed)
    assert made.current != first
    # Models that read captions through CLIP make CLIP an input of the evaluation; these do not.
    own = [f"{prior}.model={{text_encoder: own, ridge: false}}" for prior in ("ar_prior", "diffusion_prior")]
    own += ["decoder.model={text_encoder: glide, context_width: 0, text_width: 48, text_heads: 2}", "evaluation.rows=9"]
    assert "is measured on the rows of" in made.release("evaluate", *(word for each in own for word in ("--set", each)))
    assert len(asked) == 2


def test_another_clip_cannot_be_compared(made: Made) -> None:
    made.make(0.1)
    made.release("promote")
    made.store.delete([entry.path for entry in made.store.list("locks/")])
    made.make(0.2, "clip.seed=5")
    said = made.release("promote", "--set", "clip.seed=5", code=1)
    assert "another CLIP; figures by one CLIP cannot be compared with those by another" in said
    assert "uses another CLIP than" in made.release("evaluate", "--set", "clip.seed=5", code=2)


def test_diff_names_data_recipe_and_figures(made: Made) -> None:
    first, better = made.make(0.0), made.make(0.1, OTHER)
    made.release("promote")
    said = made.release("diff", *LATER)
    assert said.splitlines()[:5] == [
        f"{first[:12]} -> {better[:12]}", "data", "  the same", "recipe", "  decoder.weight_decay 0.01 -> 0.02",
    ]  # fmt: skip
    (line,) = (line for line in said.splitlines() if "decoder top" in line)
    assert line.split()[-1] == "better"
    assert "+0.1 (0.1 to 0.1)" in line
    made.release("promote", *LATER)
    back = made.release("diff", "current", "previous")
    assert "decoder.weight_decay 0.02 -> 0.01" in back
    assert "worse" in back
    assert made.release("diff", first[:10], better) == said
    assert "no bundle in" in made.release("diff", "feed", code=2)
    assert "no bundle in" in made.release("diff", "../clip", code=2)


def test_the_report_shows_the_release_beside_the_bundle(made: Made) -> None:
    made.make(0.0)
    assert comparison_section(ReportInput(made.store, made.artifacts()), "p") == ""
    made.release("promote")
    assert comparison_section(ReportInput(made.store, made.artifacts()), "p") == ""  # it is the release
    made.make(0.1, OTHER)
    shown = comparison_section(ReportInput(made.store, made.artifacts(OTHER)), "p")
    assert 'title="better">✓</span></td><td>It draws.</td><td>top</td>' in shown
    assert "<td>+0.1 (0.1 to 0.1)</td>" in shown
    assert "<bdi>decoder.weight_decay 0.01 -&gt; 0.02</bdi>" in shown
    made.make(0.1, OTHER, "evaluation.rows=9")
    shown = comparison_section(ReportInput(made.store, made.artifacts(OTHER, "evaluation.rows=9")), "p")
    assert "No figures are compared: not measured as the release was: " in shown
    assert "evaluation.rows 256 -&gt; 9" in shown


def test_diff_of_more_data(made: Made) -> None:
    made.make(0.0)
    made.release("promote")
    with open(made.path.parent / "list.csv", "a") as f:
        f.write("http://closed.test/more.png,more\n")
    made.make(0.1)
    said = made.release("diff")
    for stage in DATA:
        assert f"  {stage}: kept 12 of 12 -> 13 of 13\n" in said


def test_a_corrupt_pointer_stops_every_command_and_stays(made: Made) -> None:
    made.make(0.0)
    made.store.swap(release_path("p"), None, b"{")
    for command, *words in (("promote",), ("rollback",), ("list",), ("diff",), ("take", "folder"), ("evaluate",)):
        assert "releases/p.json is corrupt" in made.release(command, *words, code=2)
    assert made.store.read(release_path("p")) == b"{"


def test_a_damaged_evaluation_of_the_release_stays_and_is_not_compared_with(made: Made) -> None:
    made.make(0.0)
    made.release("promote")
    made.make(0.1, OTHER)
    (found,) = (m for m in jobs.release.evaluations(made.store, made.current))
    made.store.delete([blob_path(found.evaluation.blobs["evaluation.json"])])
    said = made.release("promote", *LATER, code=1)
    assert "has no evaluation in" in said
    assert load_artifact(made.store, "evaluation", found.evaluation.key) is not None


def test_a_bundle_that_is_gone_is_not_gone_back_to(made: Made) -> None:
    first = made.make(0.0)
    made.release("promote")
    better = made.make(0.1, OTHER)
    made.release("promote", *LATER)
    made.store.delete([artifact_path("bundle", first)])
    assert "is no longer in" in made.release("rollback", code=2)
    assert made.current == better


def test_a_configuration_may_begin_with_the_weights_of_the_release(made: Made) -> None:
    assert "no current release exists yet" in made.release("weights", code=2)
    first = made.make(0.0)
    made.release("promote")
    made.make(0.1, OTHER)  # made, and not the release
    artifact = load_artifact(made.store, "bundle", first)
    assert artifact is not None
    values = yaml.safe_load(made.release("weights"))
    assert values == {name: {"init_from": artifact.blobs[f"{name}/model.safetensors"]} for name in MODELS}
    made.path.write_text(yaml.safe_dump(yaml.safe_load(made.path.read_text()) | values))
    assert {v.stage for v in open_project(str(made.path), ()).plan() if v.state == "stale"} == {
        *MODELS, "bundle", "samples", "evaluation",
    }  # fmt: skip
    other = made.release("weights", "--set", "codec.components=5")
    assert f"# not ar_prior: it predicts codes of codec {artifact.inputs['codec'][:12]}" in other
    assert yaml.safe_load(other).keys() == set(MODELS) - {"ar_prior"}


def test_another_bundle_is_a_key_a_project_a_folder_or_a_release(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, better = made.make(0.0), made.make(0.1, OTHER)
    made.release("promote")
    values = yaml.safe_load(made.path.read_text())
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/bundle.json").write_text(json.dumps({"store": made.store.url, "bundle": first, "files": ""}))
    report = ["report", str(made.path), OTHER, "--output", str(tmp_path / "report.html"), "--against"]
    project = str(tmp_path / "b.yaml")
    for name in ("current", first[:10], project, str(tmp_path / "out"), f"release:{project}"):
        assert main([*report, name]) == 0, capsys.readouterr()
        found = json.loads((tmp_path / "report.json").read_text())["against"]
        assert (found["name"], found["bundle"]) == (name, first)
        assert found["recipes"] == ["decoder.weight_decay 0.01 -> 0.02"]
        assert [change["verdict"] for change in found["figures"]] == ["better"]
    for name, why in ((better[:10], "is the same bundle"), ("feed", "no bundle in"), ("absent.yaml", "absent.yaml")):
        refused(*report, name, says=why)
    refused(*report[:3], "--output", tmp_path, says="is a folder; name a file, such as")
    refused(
        *report[:3], "--output", tmp_path / "report.json", says="ends with .json, which is reserved for the figures"
    )
