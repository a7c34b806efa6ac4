"""Tests that two bundles stand side by side: samples in pairs, figures with intervals, recipes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.report.document import document
from pipeline.report.inputs import ComparedBundle, ReportInput
from pipeline.report.page import render
from pipeline.store import FolderStore
from pipeline.store.records import digest, put_blob
from tests.pipeline.report.made_up import bundle_of, config, graph


@pytest.mark.parametrize(
    ("better", "gain", "verdict"),
    [("above", 0.1, "better"), ("above", -0.1, "worse"), ("below", 0.1, "worse"), ("above", 0, "")],
)
def test_figures_differ_to_the_better_or_the_worse(
    store: FolderStore, made: dict[str, Artifact], tmp_path: Path, better: str, gain: float, verdict: str
) -> None:
    elsewhere = FolderStore(str(tmp_path))
    theirs = bundle_of(elsewhere, made, "old", 0.0, better)
    ours = bundle_of(store, made, f"new {better} {gain}", gain, better)
    given = ReportInput(store, ours, other=ComparedBundle("tom's & co.yaml", elsewhere, theirs["bundle"]))
    page = render(given, config(), graph())
    title = "Against tom&#39;s &amp; co.yaml"
    assert page.count(title) == 2 > page.count("&amp;amp;")  # in the contents, too
    section = page.partition('<section id="against">')[2].partition("</section>")[0]
    assert page.index('id="against"') < page.index('id="evaluation"')  # what was asked for comes first
    mark = {"better": "✓", "worse": "✗"}.get(verdict, "·")
    assert f'title="{verdict or "no more than chance"}">{mark}</span></td><td>It draws.</td><td>top</td>' in section
    found = json.loads(document(given, config(), graph()))["against"]
    assert [(change["name"], change["verdict"]) for change in found["figures"]] == [("top", verdict)]
    assert found["figures"][0]["difference"] == pytest.approx(gain, abs=1e-6)
    assert found["recipes"] == (["decoder.gain 0.0 -> " + str(gain)] if gain else [])


def test_samples_of_the_same_captions_stand_in_pairs(
    store: FolderStore, made: dict[str, Artifact], tmp_path: Path
) -> None:
    elsewhere = FolderStore(str(tmp_path))
    theirs = bundle_of(elsewhere, made, "old", 0.0, "above")
    samples = theirs["samples"]
    captions = [*samples.metrics["captions"][:2], *(4 * ["another"])]
    for name in samples.blobs:
        put_blob(elsewhere, store.read(f"blobs/{samples.blobs[name][:2]}/{samples.blobs[name]}"))
    changed = replace(samples, key=digest("later"), metrics={**samples.metrics, "captions": captions})
    publish_artifact(elsewhere, changed, 1.0)  # the newest of the bundle counts
    ours = bundle_of(store, made, "paired", 0.0, "above")
    page = render(ReportInput(store, ours, other=ComparedBundle("old", elsewhere, theirs["bundle"])), config(), graph())
    pairs = page.partition('<div class="pairs">')[2].partition("<section")[0]
    for caption in captions[:2]:
        assert pairs.count(f'alt="old for: {caption}"') == pairs.count(f'alt="this bundle for: {caption}"') == 1
    assert pairs.count("<img") == 4


def test_what_cannot_be_compared_says_why(store: FolderStore, made: dict[str, Artifact], tmp_path: Path) -> None:
    elsewhere = FolderStore(str(tmp_path))
    bare = publish_artifact(elsewhere, replace(made["bundle"], key=digest("bare"), inputs={}), 1.0)
    ours = bundle_of(store, made, "own", 0.0, "above")
    page = render(ReportInput(store, ours, other=ComparedBundle("bare", elsewhere, bare)), config(), graph())
    assert "No figures are compared: bare has no evaluation here." in page
    same = render(ReportInput(store, ours, other=ComparedBundle("own", store, ours["bundle"])), config(), graph())
    assert 'id="against"' not in same
