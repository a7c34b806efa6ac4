"""The stage as the graph runs it, on a small world and a bundle of models that have hardly learnt."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.clip import Clip
from pipeline.evaluate.figure import as_text, by_claim
from pipeline.evaluate.rows import SplitRows, held_out, training_rows
from pipeline.evaluate.stage import run_evaluation
from pipeline.graph.artifacts import artifact_path, write_shard_table
from pipeline.report.evaluation import evaluation_section
from pipeline.report.inputs import ReportInput
from pipeline.store.records import read_blob
from tests.pipeline.evaluate.made_up import CLIP, PLANETS, RECIPE, Case, make_case
from tests.pipeline.training.conftest import World, make_world


def test_it_measures_every_model_against_the_drawn_truth_and_repeats_to_the_byte(tmp_path: Path) -> None:
    case = make_case(tmp_path, 4, 21, 256, drawings=PLANETS)
    artifact = run_evaluation(case.context())
    document = case.document(artifact)
    found = {(f["model"], f["name"]): f for f in document["figures"]}
    drawn = [(model, part) for model in ("ar_prior", "diffusion_prior", "decoder") for part in PLANETS[0].parts]
    priors = [
        (model, f"{kind}_{baseline}")
        for model in ("ar_prior", "diffusion_prior")
        for kind in ("found", "cosine")
        for baseline in ("text", "shift", "ridge")
    ]
    conditions = [(m, "condition") for m in ("decoder", "ar_prior", "diffusion_prior", "upsampler_256")]
    assert set(found) == {*drawn, *priors, *conditions, ("upsampler_256", "psnr")}
    few = {name for name, figure in found.items() if figure["holds"] is None}
    assert {name.partition("_")[0] for _, name in few} <= {"found"}  # of 10 rows, too few are missed to find more
    assert all(len(figure["interval"]) == 2 for figure in found.values())
    assert {f["split"] for f in document["figures"]} == {"test"}
    assert all((figure["trained"] is not None) == (name in drawn) for name, figure in found.items())
    assert len(by_claim(document["figures"])) == 3 * 3 + 2 * 2 + 1 + 1  # with an upsampler to 1024 px 16
    test_rows = {key for key, example in case.world.examples.items() if example.split == "test"}
    assert all(set(part["keys"]) <= test_rows for part in document["rows"].values())
    assert {name: len(part["keys"]) for name, part in document["rows"].items()} == {
        "priors": 10, "images": 9, "upsampler_256": 8,
    }  # fmt: skip
    assert document["few"] == {}
    assert artifact.ledger.kept == 10
    for figure in document["figures"]:
        if figure["values"]:
            assert len(figure["values"]) == len(figure["groups"]) == figure["rows"]
            assert sum(figure["values"]) / figure["rows"] == pytest.approx(figure["value"], rel=1e-4, abs=1e-6)
    assert not any("values" in figure for figure in artifact.metrics["figures"])  # records stay small

    strip = np.asarray(Image.open(BytesIO(read_blob(case.world.store, artifact.blobs["held-out.png"]))))
    assert strip.shape == (4 * 64, 8 * 64, 3)
    page = evaluation_section(ReportInput(case.world.store, {"evaluation": artifact}))
    assert page.count("<img") == len(artifact.metrics["shown"]["captions"]) == 8
    assert "cannot be shown" not in page
    assert page.count("<li>") == 15
    case.world.store.delete([artifact_path("evaluation", artifact.key)])
    assert run_evaluation(case.context()).blobs == artifact.blobs


def test_other_peoples_images_keep_the_claims_that_need_no_truth(case: Case, tmp_path: Path) -> None:
    first = run_evaluation(case.context())
    assert set(first.blobs) == {"evaluation.json", "held-out.png"}
    names = {(f["model"], f["name"]) for f in first.metrics["figures"]}
    assert ("decoder", "condition") in names
    assert len(by_claim(first.metrics["figures"])) == 2 + 1 + 1
    notes = {(f["model"], f["name"]): f["note"] for f in first.metrics["figures"] if f["holds"] is None}
    notes = {of: note for of, note in notes.items() if "too few to improve on" not in note}
    why = "0 test pairs with an image of 256 px, and a figure needs 8; set source.test to 0.2 or add pairs"
    assert notes == {("upsampler_256", "psnr"): why, ("upsampler_256", "condition"): why}
    Clip.build(CLIP, 1).save(tmp_path / "judge")
    other = run_evaluation(case.context(replace(RECIPE, judge=f"local-dir:{tmp_path}/judge")))
    more = {(f["model"], f["name"]) for f in other.metrics["figures"]} - names
    assert more == {("decoder", "judged"), ("diffusion_prior", "judged")}


@pytest.mark.parametrize("more", [(5,), (13,)])  # no test row, and one
def test_without_enough_test_rows_it_takes_validation_rows(tmp_path: Path, more: tuple[int, ...]) -> None:
    world = make_world(tmp_path / "world", (5,) * 8 + more)
    found = held_out(world.store, world.inputs, 20)
    assert isinstance(found, SplitRows)
    assert found.split == "validation"
    assert found.keys == [key for key, example in world.examples.items() if example.split == "validation"]
    assert found.captions == [world.examples[key].captions[0] for key in found.keys]
    assert found.first(2).other.tolist() == [1, 0]


def test_of_too_few_rows_it_measures_nothing_and_says_so_once(tmp_path: Path) -> None:
    """Two test rows: 90 pairs at the default of source.test."""
    case = make_case(tmp_path, 2, 9, 72)
    artifact = run_evaluation(case.context())
    figures = artifact.metrics["figures"]
    assert {f["holds"] for f in figures} == {None}
    assert {f["model"] for f in figures} == {"ar_prior", "diffusion_prior", "decoder", "upsampler_256"}
    why = "2 test pairs, and a figure needs 8; set source.test to 0.2 or add pairs"
    assert {f["note"] for f in figures} == {why}
    assert set(artifact.blobs) == {"evaluation.json"}
    document = case.document(artifact)
    assert document["few"] == {"priors": 2, "images": 2, "upsampler_256": 0}
    assert {tuple(part["keys"]) for part in document["rows"].values()} == {()}
    page = evaluation_section(ReportInput(case.world.store, {"evaluation": artifact}))
    assert page.count(why) == 1
    assert "<table" not in page
    assert as_text(figures) == f"Does it learn? Nothing was measured: {why}"


def test_held_out_rows_are_the_first_with_their_images(shared_world: World) -> None:
    found = held_out(shared_world.store, shared_world.inputs, 5, side=64)
    assert isinstance(found, SplitRows)
    expected = [key for key, e in shared_world.examples.items() if e.split == "test"]
    assert found.keys == expected[:5]
    assert found.batch["image"].shape == (5, 3, 64, 64)
    example = shared_world.examples[found.keys[3]]
    assert found.batch["image_embedding"][3].numpy() == pytest.approx(example.image_embedding, abs=1e-3)
    trained = training_rows(shared_world.store, shared_world.inputs, 5)
    assert {shared_world.examples[key].split for key in trained.keys} == {"train"}


def test_groups_and_references_are_those_of_the_source_and_else_rows_are_by_themselves(case: Case) -> None:
    inputs = case.context().inputs
    found = held_out(case.world.store, inputs, 10)
    assert isinstance(found, SplitRows)
    assert found.groups == [f"concept {int(key[8:]) // 4}" for key in found.keys]
    assert found.urls == [f"http://example.test/{int(key[8:])}" for key in found.keys]
    assert found.first(3).groups == found.groups[:3]
    table, ledger = write_shard_table(case.world.store, [])
    lists_none = replace(inputs["source"], shard_table=table, ledger=ledger)
    alone = held_out(case.world.store, {**inputs, "source": lists_none}, 10)
    assert isinstance(alone, SplitRows)
    assert (alone.groups, alone.urls) == (alone.keys, [""] * 10)
