"""The stage as the graph runs it, on a small world and a bundle of models that have hardly learnt."""

import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from io import BytesIO
from itertools import product
from pathlib import Path
from types import SimpleNamespace
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
from models.folder import save_model
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.prior_configs import ARPriorConfig, ClipConfig, DiffusionPriorConfig
from models.sampling_config import SamplingConfig
from models.upsampler import Upsampler
from pipeline.evaluate.captions import Phrases
from pipeline.evaluate.evaluation import GUIDANCES
from pipeline.evaluate.figure import as_text
from pipeline.evaluate.rows import HeldOut, held_out, training_rows
from pipeline.evaluate.stage import EvaluationRecipe, run_evaluation
from pipeline.graph.artifacts import Artifact, artifact_path, load_artifact, publish_artifact, write_shard_table
from pipeline.graph.stages import Context, Stage, stage_key
from pipeline.ledger import Ledger
from pipeline.parse import ContentFile
from pipeline.report.evaluation import evaluation_section, measured_sections
from pipeline.report.inputs import ReportInput
from pipeline.store.records import blob_path, put_blob, read_blob
from pipeline.training.recipes import DecoderRecipe
from pipeline.training.tasks.figures import seeded
from tests.pipeline.evaluate.test_inception import save_weights
from tests.pipeline.training.conftest import EMBED_DIM, World, make_world

TEXT = {"text_context": 16, "text_width": 16, "text_depth": 1, "text_heads": 1}
SMALL = {"channels": 8, "depth": 1, "multipliers": (1,), "dropout": 0.0, "steps": 20}
DECODER = DecoderConfig(**SMALL, **TEXT, head_channels=8, attention_resolutions=(8,), patch=8)
CLIP = ClipConfig(
    embed_dim=EMBED_DIM, image_size=32, layers=(1,), width=32, patch=16, text_width=16, text_layers=1, text_heads=1
)
RECIPE = EvaluationRecipe(
    rows=10,
    prior_samples=2,
    sampled_rows=8,
    decoder_rows=9,
    caption_rows=8,
    name_rows=8,
    upsampler_256_rows=8,
    upsampler_samples=2,
    early=32,
)
READS = ("pairs", "captions", "embeddings", "curation")  # the inputs of a decoder with a text encoder of its own
SAMPLING = SamplingConfig(prior_steps=2, decoder_steps=2, decoder_sampler="ddim", upsampler_256_steps=2, size=256)


def awake(model: Decoder) -> Decoder:
    """Without the zeros with which a training begins, and with which all conditions give the same image."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def unclip(priors: tuple[str, ...] = ("ar", "diffusion"), decoder: DecoderConfig = DECODER) -> UnCLIP:
    z = F.normalize(torch.randn(60, EMBED_DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    codec = fit_codec(z, z[:, 0].double(), 4, 8).codec
    ar = ARPriorConfig(**TEXT, prefix=4, width=16, depth=1, heads=1, buckets=8)
    diffusion = DiffusionPriorConfig(text_context=16, width=16, depth=1, heads=1, steps=20)
    upsampler = UpsamplerConfig(**SMALL, patch=8)

    def build() -> UnCLIP:
        return UnCLIP(
            clip=Clip.build(CLIP, 0),
            decoder=awake(Decoder(decoder, EMBED_DIM)),
            diffusion_prior=DiffusionPrior(diffusion, EMBED_DIM) if "diffusion" in priors else None,
            ar_prior=ARPrior(ar, EMBED_DIM, 4) if "ar" in priors else None,
            codec=codec,
            upsampler_256=Upsampler(upsampler),
            sampling=replace(SAMPLING, prior=priors[-1], decoder_guidance=0.25 if decoder.drop_text else 0.0),
        )

    return seeded(build, 0)  # type: ignore[type-var,arg-type]


@dataclass(frozen=True)
class Case:
    """A world with a bundle in its store."""

    world: World
    bundle: Artifact

    def context(self, recipe: EvaluationRecipe = RECIPE) -> Context:
        inputs = {name: self.world.inputs[name] for name in (*READS, "source")} | {"bundle": self.bundle}
        stage = Stage("evaluation", 1, recipe, tuple(inputs), run_evaluation)
        key = stage_key(stage, {name: artifact.key for name, artifact in inputs.items()})
        config = SimpleNamespace(decoder=DecoderRecipe(samples=64, batch=16, lanes=8, model=DECODER))
        return Context(self.world.store, "evaluation", 1, key, recipe, None, inputs, config)

    def publish_early(self, folder: Path) -> str:
        """What the decoder's training leaves at the recipe's early samples; returns its key."""
        recipe = replace(self.context().config.decoder, samples=RECIPE.early)
        node = Stage("decoder", recipe.version, recipe, READS, run_evaluation)
        key = stage_key(node, {name: self.world.inputs[name].key for name in READS})
        save_model(folder, seeded(lambda: Decoder(DECODER, EMBED_DIM), 7))
        blobs = {file.name: put_blob(self.world.store, file) for file in folder.iterdir()}
        publish_artifact(self.world.store, Artifact("decoder", key, {}, {}, Ledger(), blobs), 0.0)
        return key


def make_case(folder: Path, shards: int, rows: int, side: int, *models: Any) -> Case:
    """Returns a world whose bundle has what ``unclip`` takes for ``models``."""
    world = make_world(folder / "store", [rows + number for number in range(shards)], side)
    unclip(*models).save(folder / "bundle")
    files = [file for file in sorted((folder / "bundle").rglob("*")) if file.is_file()]
    blobs = {str(file.relative_to(folder / "bundle")): put_blob(world.store, file) for file in files}
    return Case(world, publish_artifact(world.store, Artifact("bundle", "b" * 64, {}, {}, Ledger(), blobs), 0.0))


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run side by side."""
    monkeypatch.setattr("pipeline.sampling.drawing.cores", torch.get_num_threads)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path, 4, 21, 256)


def test_it_measures_every_model_and_repeats_to_the_byte(case: Case, tmp_path: Path) -> None:
    key = case.publish_early(tmp_path / "early")
    artifact = run_evaluation(case.context())
    document = json.loads(read_blob(case.world.store, artifact.blobs["evaluation.json"]))
    found = [(f["line"], f["model"]) for f in document["figures"] if f["holds"] is not None]
    assert set(found) == {
        ("a", "ar_prior"), ("a", "diffusion_prior"), ("a", "decoder"), ("a", "upsampler_256"), ("b", "ar_prior"),
        ("c", "ar_prior"), ("c", "diffusion_prior"), ("e", "upsampler_256"), ("f", "decoder"),
    }  # fmt: skip
    assert found.count(("f", "decoder")) == 6
    assert {f["split"] for f in document["figures"] if not f["name"].endswith("_train")} == {"test"}
    assert {f["split"] for f in document["figures"] if f["name"].endswith("_train")} == {"train"}
    test_rows = {key for key, example in case.world.examples.items() if example.split == "test"}
    assert all(set(part["keys"]) <= test_rows for part in document["rows"].values())
    assert {name: len(part["keys"]) for name, part in document["rows"].items()} == {
        "priors": 10, "decoder": 9, "names": 8, "upsampler_256": 8,
    }  # fmt: skip
    assert document["few"] == {}
    assert artifact.ledger.kept == 10
    plain = {(f["line"], f["model"]) for f in document["figures"] if f["holds"] is None and not f["note"]}
    models = ("decoder", "ar_prior", "diffusion_prior")
    assert plain == {
        ("c", "ar_prior"), ("c", "diffusion_prior"), ("e", "upsampler_256"), *product("fm", models),
        ("g", "ar_prior"), ("g", "diffusion_prior"),
    }  # fmt: skip
    closest = artifact.metrics["closest"]
    assert [pair["distance"] for pair in closest] == sorted(pair["distance"] for pair in closest)
    assert {pair["caption"] for pair in closest} <= set(artifact.metrics["captions"])
    licenses = artifact.metrics["licenses"]  # of images, and of what is drawn from their embeddings
    assert len(closest) == len(licenses["nearest.png"]) == 8
    assert licenses["guidance.png"] == licenses["comparison.png"]
    assert set(artifact.blobs) == {
        "evaluation.json", "comparison.png", "nearest.png", "guidance.png", "names.png",
    }  # fmt: skip
    named = artifact.metrics["named"]
    assert [row["split"] for row in named] == ["test"] * 8 + ["train"] * 8
    assert len({row["caption"] for row in named[:8]}) == 8  # each caption once
    drawn = np.asarray(Image.open(BytesIO(read_blob(case.world.store, artifact.blobs["names.png"]))))
    assert drawn.shape == (3 * 64, 16 * 64, 3)
    guided = np.asarray(Image.open(BytesIO(read_blob(case.world.store, artifact.blobs["guidance.png"]))))
    assert guided.shape == (len(GUIDANCES) * 64, 8 * 64, 3)
    assert not np.array_equal(guided[:64], guided[-64:])

    page = evaluation_section(ReportInput(case.world.store, {"evaluation": artifact}))
    more = measured_sections(ReportInput(case.world.store, {"evaluation": artifact}))
    # Of eight captions: drawn, by guidance, what is nearest; and of eight training rows.
    assert page.count("<img") == 4 * more.count("<img") == 32
    assert page.count("held out: ") == page.count("trained on: ") > 0
    assert "cannot be shown" not in page + more
    assert page.count("✓") + page.count("✗") == 2 * len(found)  # with its bar, and with all numbers

    case.world.store.delete([artifact_path("evaluation", artifact.key)])
    assert run_evaluation(case.context()).blobs == artifact.blobs

    # What is no input is never waited for: a damaged early checkpoint costs its lines.
    early = load_artifact(case.world.store, "decoder", key)
    assert early is not None
    case.world.store.delete([artifact_path("evaluation", artifact.key), blob_path(early.blobs["model.safetensors"])])
    without = run_evaluation(case.context())
    notes = [f["note"] for f in without.metrics["figures"] if f["line"] == "f" and f["note"]]
    assert len(notes) == 2
    assert all(note.endswith("was damaged; a decoder trained from the start leaves a new one") for note in notes)
    assert load_artifact(case.world.store, "decoder", key) is None


def test_a_bundle_with_one_prior_no_early_checkpoint_and_a_decoder_that_cannot_be_guided(tmp_path: Path) -> None:
    case = make_case(tmp_path, 4, 20, 72, ("diffusion",), replace(DECODER, drop_text=0.0))
    first = run_evaluation(case.context())
    assert set(first.blobs) == {"evaluation.json", "comparison.png", "nearest.png", "names.png"}
    figures = first.metrics["figures"]
    assert not [f for f in figures if f["model"] == "ar_prior"]
    notes = {(f["line"], f["model"]): f["note"] for f in figures if f["note"]}
    why = "0 test pairs with an image of 256 px, and a figure needs 8; set source.test to 0.2 or add pairs"
    assert notes["a", "upsampler_256"] == notes["e", "upsampler_256"] == why
    assert "the decoder at 32 samples is not in the store" in notes["f", "decoder"]
    Clip.build(CLIP, 1).save(tmp_path / "judge")
    inception = ContentFile.at(str(save_weights(tmp_path / "inception.pth")), "evaluation.inception")
    recipe = replace(RECIPE, early=64, judge=f"local-dir:{tmp_path}/judge", inception=inception)
    other = run_evaluation(case.context(recipe))
    notes = {f["note"] for f in other.metrics["figures"]}
    assert any("evaluation.early 64 is not between decoder.batch 16 and samples 64" in note for note in notes)
    document = json.loads(read_blob(case.world.store, other.blobs["evaluation.json"]))
    seen = {(f["model"], f["name"]): f["value"] for f in document["figures"] if f["line"] == "f"}
    by_clip = {(model, name.removeprefix("clip_")) for model, name in seen if name.startswith("clip_")}
    assert {name for _, name in by_clip} == {"score", "r_precision", "cmmd", "frechet", "precision", "recall"}
    assert {model for model, _ in by_clip} == {"decoder", "diffusion_prior"}
    assert all(seen[model, f"judge_{name}"] is not None for model, name in by_clip)
    assert any(seen[model, f"judge_{name}"] != seen[model, f"clip_{name}"] for model, name in by_clip)
    assert {model for model, name in seen if name == "fid" and seen[model, name] > 0} == {"decoder", "diffusion_prior"}
    assert other.environment["torchmetrics"] == version("torchmetrics")
    assert document["recipe"]["inception"] == inception


@pytest.mark.parametrize("more", [(5,), (13,)])  # no test row, and one
def test_without_enough_test_rows_it_takes_validation_rows(tmp_path: Path, more: tuple[int, ...]) -> None:
    world = make_world(tmp_path / "world", (5,) * 8 + more)
    found = held_out(world.store, world.inputs, 20)
    assert isinstance(found, HeldOut)
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
    assert {f["line"] for f in figures} == set("abcef")  # nothing is said of backgrounds here
    why = "2 test pairs, and a figure needs 8; set source.test to 0.2 or add pairs"
    assert {f["note"] for f in figures} == {why}
    assert set(artifact.blobs) == {"evaluation.json"}
    document = json.loads(read_blob(case.world.store, artifact.blobs["evaluation.json"]))
    assert document["few"] == {"priors": 2, "decoder": 2, "upsampler_256": 0}
    assert {tuple(part["keys"]) for part in document["rows"].values()} == {()}
    page = evaluation_section(ReportInput(case.world.store, {"evaluation": artifact}))
    assert f"<li>{why}: " in page
    assert page.count(why) == 1
    assert "<table" not in page
    assert measured_sections(ReportInput(case.world.store, {"evaluation": artifact})) == ""
    assert as_text(figures) == f"Does it learn? Nothing was measured: {why}"


def test_backgrounds_and_names_are_looked_at_only_where_a_configuration_says_what_captions_name(case: Case) -> None:
    """The same world twice: its captions, "a red circle", end with words that a configuration may name."""

    def measured(recipe: EvaluationRecipe) -> dict[tuple[str, str], dict[str, Any]]:
        artifact = run_evaluation(case.context(recipe))
        document = json.loads(read_blob(case.world.store, artifact.blobs["evaluation.json"]))
        page = evaluation_section(ReportInput(case.world.store, {"evaluation": artifact}))
        assert ('id="claims-d"' in page) == bool(recipe.phrases.backgrounds)
        return {(f["model"], f["name"]): f for f in document["figures"]}

    plain = measured(RECIPE)
    assert not {name for _, name in plain if name in ("background", "clip_name_alone", "clip_within_style")}
    assert not [f for f in plain.values() if f["line"] == "d" or f["name"] in ("own_image", "clip_names")]
    phrases = Phrases(backgrounds={"circle": (255, 255, 255), "square": (255, 0, 0), "bar": (0, 0, 255)})
    named = measured(replace(RECIPE, phrases=phrases))
    assert {model for model, name in named if name == "background"} == {"decoder", "ar_prior", "diffusion_prior"}
    assert named["decoder", "background"]["rows"] >= 8
    assert named["decoder", "clip_name_alone"]["rows"] >= 8
    assert named["ar_prior", "own_image"]["line"] == "c"
    assert named["ar_prior", "clip_names"]["line"] == "g"
    assert "whitened directions within style and background" in named["ar_prior", "mmd_whitened"]["says"]


def test_held_out_rows_are_the_first_with_their_images(shared_world: World) -> None:
    found = held_out(shared_world.store, shared_world.inputs, 5, side=64)
    assert isinstance(found, HeldOut)
    expected = [key for key, e in shared_world.examples.items() if e.split == "test"]
    assert found.keys == expected[:5]
    assert found.batch["image"].shape == (5, 3, 64, 64)
    example = shared_world.examples[found.keys[3]]
    assert found.batch["image_embedding"][3].numpy() == pytest.approx(example.image_embedding, abs=1e-3)
    liked = held_out(shared_world.store, shared_world.inputs, 5, prefer=lambda caption: "square" in caption)
    assert isinstance(liked, HeldOut)
    squares = [key for key in expected if "square" in shared_world.examples[key].captions[0]]
    assert liked.keys == [*squares, *(key for key in expected if key not in squares)][:5]
    seen = training_rows(shared_world.store, shared_world.inputs)
    assert len(seen.places) == len(seen.image_embedding) == len(seen.text_embedding)
    assert seen.captions == [(shared_world.examples[place.key].captions or [""])[0] for place in seen.places]
    assert not {place.key for place in seen.places} & {
        k for k, e in shared_world.examples.items() if e.split != "train"
    }


def test_groups_are_those_of_the_source_and_else_rows_by_themselves(case: Case) -> None:
    inputs = case.context().inputs
    found = held_out(case.world.store, inputs, 10)
    assert isinstance(found, HeldOut)
    assert found.groups == [f"concept {int(key[8:]) // 4}" for key in found.keys]
    assert found.first(3).groups == found.groups[:3]
    table, ledger = write_shard_table(case.world.store, [])
    lists_none = replace(inputs["source"], shard_table=table, ledger=ledger)
    alone = held_out(case.world.store, {**inputs, "source": lists_none}, 10)
    assert isinstance(alone, HeldOut)
    assert alone.groups == alone.keys
