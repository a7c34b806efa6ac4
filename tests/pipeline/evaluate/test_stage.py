"""The stage as the graph runs it, on a small world and a bundle of models that have hardly learnt."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.ar_prior import ARPrior
from models.cascade import UnCLIP
from models.clip import Clip
from models.codec_fit import fit_codec
from models.decoder import Decoder
from models.diffusion_prior import DiffusionPrior
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.prior_configs import ARPriorConfig, ClipConfig, DiffusionPriorConfig
from models.sampling_config import SamplingConfig
from models.upsampler import Upsampler
from pipeline.data.source.drawings.world import Drawing
from pipeline.evaluate.figure import as_text, by_claim
from pipeline.evaluate.recipe import EvaluationRecipe
from pipeline.evaluate.rows import SplitRows, held_out, training_rows
from pipeline.evaluate.stage import run_evaluation
from pipeline.graph.artifacts import Artifact, artifact_path, publish_artifact, write_shard_table
from pipeline.graph.stages import Context, Stage, stage_key
from pipeline.ledger import Ledger
from pipeline.report.evaluation import evaluation_section
from pipeline.report.inputs import ReportInput
from pipeline.store.records import put_blob, read_blob
from pipeline.training.tasks.figures import seeded
from tests.pipeline.training.conftest import EMBED_DIM, World, make_world

PLANETS = [
    Drawing("planets", (surface, colour, "blue", ring, "one"))
    for surface, colour, ring in (("plain", "pink", "none"), ("banded", "red", "thin"), ("capped", "green", "broad"))
]
TEXT = {"text_context": 16, "text_width": 16, "text_depth": 1, "text_heads": 1}
SMALL = {"channels": 8, "depth": 1, "multipliers": (1,), "dropout": 0.0, "steps": 20}
DECODER = DecoderConfig(**SMALL, **TEXT, head_channels=8, attention_resolutions=(8,), patch=8)
CLIP = ClipConfig(
    embed_dim=EMBED_DIM, image_size=32, layers=(1,), width=32, patch=16, text_width=16, text_layers=1, text_heads=1
)
RECIPE = EvaluationRecipe(rows=10, image_rows=9, upsampler_rows=8, samples=2)
READS = ("pairs", "captions", "embeddings", "curation")  # the inputs of a decoder with a text encoder of its own
SAMPLING = SamplingConfig(prior_steps=2, decoder_steps=2, decoder_sampler="ddim", upsampler_256_steps=2, size=256)


def awake(model: Decoder) -> Decoder:
    """Without the zeros with which a training begins, and with which all conditions give the same image."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def unclip(priors: tuple[str, ...] = ("ar", "diffusion")) -> UnCLIP:
    z = F.normalize(torch.randn(60, EMBED_DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    codec = fit_codec(z, z[:, 0].double(), 4, 8).codec
    ar = ARPriorConfig(**TEXT, prefix=4, width=16, depth=1, heads=1, buckets=8)
    diffusion = DiffusionPriorConfig(text_context=16, width=16, depth=1, heads=1, steps=20)
    upsampler = UpsamplerConfig(**SMALL, patch=8)

    def build() -> UnCLIP:
        return UnCLIP(
            clip=Clip.build(CLIP, 0),
            decoder=awake(Decoder(DECODER, EMBED_DIM)),
            diffusion_prior=DiffusionPrior(diffusion, EMBED_DIM) if "diffusion" in priors else None,
            ar_prior=ARPrior(ar, EMBED_DIM, 4) if "ar" in priors else None,
            codec=codec,
            upsampler_256=Upsampler(upsampler),
            sampling=replace(SAMPLING, prior=priors[-1]),
        )

    return seeded(build, 0)


@dataclass(frozen=True)
class Case:
    """A world with a bundle in its store."""

    world: World
    bundle: Artifact

    def context(self, recipe: EvaluationRecipe = RECIPE) -> Context:
        inputs = {name: self.world.inputs[name] for name in (*READS, "source")} | {"bundle": self.bundle}
        stage = Stage("evaluation", 1, recipe, tuple(inputs), run_evaluation)
        key = stage_key(stage, {name: artifact.key for name, artifact in inputs.items()})
        return Context(self.world.store, "evaluation", 1, key, recipe, None, inputs)

    def document(self, artifact: Artifact) -> dict[str, Any]:
        return json.loads(read_blob(self.world.store, artifact.blobs["evaluation.json"]))


def make_case(
    folder: Path, shards: int, rows: int, side: int, priors: tuple[str, ...] = ("ar", "diffusion"),
    drawings: Sequence[Drawing] = (),
) -> Case:  # fmt: skip
    """Returns a world whose bundle has these priors, and whose references name these drawings."""
    world = make_world(folder / "store", [rows + number for number in range(shards)], side, drawings)
    unclip(priors).save(folder / "bundle")
    files = [file for file in sorted((folder / "bundle").rglob("*")) if file.is_file()]
    blobs = {str(file.relative_to(folder / "bundle")): put_blob(world.store, file) for file in files}
    return Case(world, publish_artifact(world.store, Artifact("bundle", "b" * 64, {}, {}, Ledger(), blobs), 0.0))


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run side by side."""
    monkeypatch.setattr("pipeline.sampling.drawing.cores", torch.get_num_threads)


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


def test_other_peoples_images_keep_the_claims_that_need_no_truth(tmp_path: Path) -> None:
    case = make_case(tmp_path, 4, 20, 72, ("diffusion",))
    first = run_evaluation(case.context())
    assert set(first.blobs) == {"evaluation.json", "held-out.png"}
    names = {(f["model"], f["name"]) for f in first.metrics["figures"]}
    assert ("decoder", "condition") in names
    assert len(by_claim(first.metrics["figures"])) == 2 + 1 + 1
    notes = {(f["model"], f["name"]): f["note"] for f in first.metrics["figures"] if f["holds"] is None}
    notes = {of: note for of, note in notes.items() if "too few to do better" not in note}
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


def test_groups_and_references_are_those_of_the_source_and_else_rows_are_by_themselves(tmp_path: Path) -> None:
    case = make_case(tmp_path, 4, 20, 72)
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
