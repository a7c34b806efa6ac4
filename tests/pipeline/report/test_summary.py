"""Tests the sentence, the tiles and the lines of claims: what a reader sees before anything else."""

import json
from dataclasses import replace
from typing import Any

import pytest

from pipeline.graph.artifacts import Artifact
from pipeline.report.document import document
from pipeline.report.evaluation import claims
from pipeline.report.inputs import ReportInput
from pipeline.report.page import render
from pipeline.report.summary import verdict
from pipeline.store import FolderStore
from tests.pipeline.report.made_up import config, figure, graph, judged


def test_the_sentence_says_what_is_done_and_then_what_was_found(made: dict[str, Artifact]) -> None:
    assert verdict(graph(), {"source": made["source"]}) == "1 of 17 stages are done; next is captions."
    running = replace(made["decoder"], metrics={"samples_seen": 1024})
    said = "1 of 17 stages are done; decoder is being trained: 1,024 of 51,200 samples."
    assert verdict(graph(), {"source": made["source"]}, [running]) == said
    assert verdict(graph(), judged(made, figure(True))) == "1 of 1 claims hold on held-out rows."
    others = [figure(False, "It listens."), figure(False, "It reads.", model="clip"), figure(True, "It reads.")]
    found = judged(made, figure(True), figure(None, note="few"), *others)
    assert verdict(graph(), found) == "1 of 3 claims hold on held-out rows; the others are about decoder and clip."
    few = judged(made, figure(None, note="2 test pairs; set source.test to 0.2"))
    assert verdict(graph(), few) == "Nothing was measured: 2 test pairs; set source.test to 0.2."


def test_the_sentence_says_that_a_failing_prior_drew_nothing(made: dict[str, Artifact]) -> None:
    drawn = replace(made["samples"], metrics={**made["samples"].metrics, "settings": {"prior": "diffusion"}})
    found = judged(made, figure(True), figure(False, "It reads.", model="ar_prior")) | {"samples": drawn}
    said = "1 of 2 claims hold on held-out rows; the others are about ar_prior, which drew none of these images."
    assert verdict(graph(), found) == said
    found["samples"] = replace(drawn, metrics={**drawn.metrics, "settings": {"prior": "ar"}})
    assert verdict(graph(), found).endswith("the others are about ar_prior.")


def test_claims_that_fail_come_first_and_a_figure_says_why_it_is_missing() -> None:
    figures = [figure(True, "one"), figure(True, "two"), figure(False, "two", says="part")]
    figures += [figure(None, "three", note="few rows"), figure(True, "four") | {"value": None}]
    page = claims(figures)
    places = [page.index(f"<b>{word}</b>") for word in ("two", "one", "three", "four")]
    assert places == sorted(places)
    assert '<span class="bad">part 0.5</span> / 0.4' in page
    assert "x not measured: few rows" in page


def test_the_report_says_how_many_figures_would_hold_by_chance() -> None:
    figures = [figure(i % 2 == 0, f"line {i}") for i in range(34)]
    page = claims([*figures, figure(None, "three", note="few rows")])
    assert "By chance alone about 0.85 of 34 figures would be\nsignificant." in page


def test_the_twin_for_programs_says_what_the_page_says(store: FolderStore, made: dict[str, Artifact]) -> None:
    found = json.loads(document(ReportInput(store, made), config(), graph()))
    assert found["verdict"] == verdict(graph(), made)
    assert {stage["stage"]: stage["key"] for stage in found["stages"]} == {name: a.key for name, a in made.items()}
    curation = next(stage for stage in found["stages"] if stage["stage"] == "curation")
    assert (curation["rows"], curation["kept"], curation["rejected"]) == (78, 75, {"low_similarity": 3})
    assert [figure["holds"] for figure in found["figures"]].count(None) == 1
    assert found["samples"][1] == {"file": "samples/0001.png", "caption": "a coral square on white", "seed": 1}
    assert found["cannot_be_shown"] == {}


def test_the_twin_never_fails_and_is_json_that_everybody_reads(store: FolderStore, made: dict[str, Artifact]) -> None:
    odd = {name: replace(a, metrics={"loss": float("nan")}, times={}, blobs={}) for name, a in made.items()}
    found = json.loads(
        document(ReportInput(store, odd), config(), graph()), parse_constant=lambda name: pytest.fail(name)
    )
    assert found["figures"] is None
    assert found["cannot_be_shown"].keys() == {"verdict", "train_longer", "figures"}
    assert json.loads(document(ReportInput(store, {}), config(), graph()))["stages"][0] == {
        "stage": "source",
        "made": False,
    }


def test_commands_draw_the_samples_again_and_full_size_is_linked_where_it_is(
    store: FolderStore, made: dict[str, Artifact], tmp_path: Any
) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/0001.png").touch()
    words = "--seed 1 -- &#39;a coral square on white&#39;</code>"
    assert f"unclip sample {words}" in render(ReportInput(store, made, folder=tmp_path), config(), graph())
    (tmp_path / "bundle.json").touch()
    page = render(ReportInput(store, made, folder=tmp_path), config(), graph())
    assert f"unclip sample --from {tmp_path} {words}" in page
    assert page.count('href="samples/') == page.count('href="samples/0001.png"') == 1
