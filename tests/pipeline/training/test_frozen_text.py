"""Trainings whose models read captions through the text tower of the run's CLIP: what is trained, kept and resumed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from models.clip import Clip
from models.folder import load_model
from models.frozen_text import FrozenTower
from pipeline.build import build
from pipeline.config import load_config, preset_config
from pipeline.cost.flops import count_model
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.ledger import Ledger
from pipeline.parse import ContentFile
from pipeline.store.records import materialise, put_blob, read_blob
from pipeline.training import stage
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.recipes import DecoderRecipe, DiffusionPriorRecipe
from pipeline.training.state import begin, parts
from pipeline.training.task import task_of
from pipeline.training.tasks.starts import ridge
from tests.pipeline.golden import ROOT
from tests.pipeline.training.conftest import World, make_world
from tests.pipeline.training.trainings import (
    CLIP_MODEL,
    DECODER,
    MODEL,
    SETTINGS,
    assert_close,
    made,
    train_together,
    weights,
)

CLIP = replace(CLIP_MODEL, text_heads=2, text_context=16)
SHARED: dict[str, Any] = {"lanes": 4, "precision": "fp32", "learning_rate": 1e-2}
PRIOR = DiffusionPriorRecipe(
    samples=48, batch=16, weight_decay=0.1, ema_half_life=64, model=replace(MODEL, text_encoder="frozen"), **SHARED
)
PICTURES = DecoderRecipe(samples=16, batch=8, model=replace(DECODER, text_encoder="frozen"), **SHARED)
INPUTS = ("pairs", "captions", "embeddings", "curation", "clip")


def with_clip(world: World, folder: Path, seed: int = 0) -> World:
    """The same world, and a CLIP of random weights."""
    clip = Clip.build(CLIP, seed)
    clip.save(folder)
    blobs = {file.name: put_blob(world.store, file) for file in sorted(folder.iterdir())}
    artifact = publish_artifact(world.store, Artifact("clip", f"{seed:064d}", {}, {}, Ledger(), blobs), 0.0)
    return replace(world, inputs=world.inputs | {"clip": artifact})


def tower(seed: int = 0) -> FrozenTower:
    clip = Clip.build(CLIP, seed)
    return FrozenTower.of(clip.model_config, clip.model.state_dict())


def check_tower(tensors: dict[str, torch.Tensor], prefix: str, seed: int = 0) -> None:
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = tower(seed).weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_prior_and_a_decoder_leave_the_tower_as_it_was(world: World, tmp_path: Path) -> None:
    """Also where a training goes on from its checkpoint; a folder of the model opens by itself."""
    world = with_clip(world, tmp_path / "clip")
    for name, recipe, prefix in (("diffusion_prior", PRIOR, "caption.text."), ("decoder", PICTURES, "text.")):
        half = replace(recipe, samples=recipe.batch)
        stage.train(world.context(name, half, SETTINGS, INPUTS))
        artifact = stage.train(world.context(name, recipe, SETTINGS, INPUTS))
        check_tower(weights(world, artifact), prefix)
        materialise(world.store, artifact.blobs, tmp_path / name)
        assert load_model(tmp_path / name).text_tower == tower().sizes


def test_nothing_of_the_tower_is_in_the_optimiser_or_averaged(world: World, tmp_path: Path) -> None:
    world = with_clip(world, tmp_path / "clip")
    state = begin(task_of(world.context("diffusion_prior", PRIOR, inputs=INPUTS)), PRIOR, ProcessGroup())
    frozen = {name for name, parameter in state.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"caption.text.{name}" for name in tower().weights}
    learned = {id(parameter) for group in state.optimizer.param_groups for parameter in group["params"]}
    assert not learned & {id(dict(state.model.named_parameters())[name]) for name in frozen}
    assert not parts(state)["optimizer"]


def test_a_training_that_begins_with_other_weights_keeps_its_own_clips_tower(world: World, tmp_path: Path) -> None:
    first = with_clip(world, tmp_path / "first", seed=1)
    blob = stage.train(first.context("diffusion_prior", PRIOR, SETTINGS, INPUTS)).blobs["model.safetensors"]
    second = with_clip(world, tmp_path / "second", seed=2)
    recipe = replace(PRIOR, init_from=ContentFile.at(blob, ""), learning_rate=1e-30, weight_decay=0.0)
    found = weights(second, stage.train(second.context("diffusion_prior", recipe, SETTINGS, INPUTS)))
    check_tower(found, "caption.text.", seed=2)
    first_made = load(read_blob(world.store, blob))
    assert torch.equal(found["caption.states_in.weight"], first_made["caption.states_in.weight"])


def test_a_line_holds_back_where_that_costs_little() -> None:
    """What rows hardly show is not guessed from their noise, and what they show is kept."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 6, generator=g, dtype=torch.float64) * torch.tensor([1, 1, 1, 1, 1, 1e-3])
    truth = torch.randn(3, 6, generator=g, dtype=torch.float64)
    images = inputs @ truth.T + 0.1 * torch.randn(400, 3, generator=g, dtype=torch.float64) + 5
    line = ridge(inputs, images)
    torch.testing.assert_close(line.weight[:, :5], truth[:, :5], rtol=0, atol=0.05)
    least = torch.linalg.lstsq(inputs - inputs.mean(0), images - images.mean(0)).solution.T
    assert line.weight[:, 5].norm() < 0.1 * least[:, 5].norm()
    torch.testing.assert_close(line.image_mean, images.mean(0))
    assert ridge(inputs[:1], images[:1]).weight.norm() == 0


def test_a_text_tower_of_another_kind_is_one_line(world: World, tmp_path: Path) -> None:
    world = with_clip(world, tmp_path / "clip")
    file = tmp_path / "clip/open_clip_config.json"
    document = json.loads(file.read_text())
    document["model_cfg"]["text_cfg"]["no_causal_mask"] = True
    file.write_text(json.dumps(document))
    odd = replace(world.inputs["clip"], blobs=world.inputs["clip"].blobs | {file.name: put_blob(world.store, file)})
    world = replace(world, inputs=world.inputs | {"clip": odd})
    with pytest.raises(
        UserError, match=r"diffusion_prior.model: .*this CLIP's has no_causal_mask: choose another CLIP"
    ):
        stage.train(world.context("diffusion_prior", PRIOR, SETTINGS, INPUTS))


def test_only_a_model_that_reads_clip_depends_on_it() -> None:
    priors, changes = ("ar_prior", "diffusion_prior"), ("text_encoder=own", "ridge=false")
    own = [f"{prior}.model.{change}" for prior in priors for change in changes]
    glide = "decoder.model={text_encoder: glide, context_width: 0, text_width: 48, text_heads: 2}"
    plain = build(load_config(ROOT / "configs/nano.yaml", [*own, glide]))
    frozen = build(load_config(ROOT / "configs/nano.yaml", own))
    assert {name for name in plain if plain[name].inputs != frozen[name].inputs} == {"decoder", "evaluation"}
    assert frozen["decoder"].inputs == INPUTS
    assert "clip" in frozen["evaluation"].inputs


def test_a_plan_counts_the_tower() -> None:
    config = preset_config("nano")
    for name in ("ar_prior", "diffusion_prior", "decoder"):
        recipe = getattr(config, name)
        counted = replace(config, **{name: replace(recipe, model=replace(recipe.model, text_encoder="frozen"))})
        # A token table of CLIP's width in place of its own, of its own width.
        assert count_model(counted, name).parameters > 49_408 * config.clip.model.text_width
    named = replace(counted, clip=replace(config.clip, weights="open_clip:ViT-B-16-SigLIP:webli"))  # type: ignore[call-arg]
    with pytest.raises(UserError, match="reads text towers like CLIP's own"):
        count_model(named, "decoder")


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_workers_train_what_one_process_trains(sharded: bool, world: World, tmp_path: Path) -> None:
    alone = with_clip(make_world(tmp_path / "alone"), tmp_path / "clip")
    together = with_clip(world, tmp_path / "clip")
    settings = replace(SETTINGS, workers=2, sharded=sharded)
    ctx = together.context("diffusion_prior", PRIOR, settings, INPUTS)
    train_together(ctx, tmp_path)
    found = weights(together, made(together, ctx))
    check_tower(found, "caption.text.")
    assert_close(found, weights(alone, stage.train(alone.context("diffusion_prior", PRIOR, SETTINGS, INPUTS))))
