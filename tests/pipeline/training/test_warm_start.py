"""Beginning with weights that exist."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.parse import ContentFile
from pipeline.store.records import put_blob, read_blob
from pipeline.training import stage
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.recipes import ClipRecipe, DiffusionPriorRecipe
from pipeline.training.state import TrainState
from tests.pipeline.training.conftest import World
from tests.pipeline.training.trainings import CLIP_MODEL, MODEL, weights

RECIPE = DiffusionPriorRecipe(samples=32, batch=16, lanes=8, model=MODEL, precision="fp32", seed=5)
STILL = {"learning_rate": 1e-30, "weight_decay": 0.0}


def trained(world: World, recipe: DiffusionPriorRecipe) -> tuple[str, dict[str, torch.Tensor]]:
    """The blob of a trained prior's weights, and the weights."""
    made = stage.train(world.context("diffusion_prior", recipe))
    return made.blobs["model.safetensors"], weights(world, made)


def test_a_training_begins_with_the_weights_of_another(world: World, tmp_path: Path) -> None:
    """Named by file or by blob: one key, and with a learning rate near 0 the same weights come out."""
    blob, before = trained(world, RECIPE)
    (tmp_path / "model.safetensors").write_bytes(read_blob(world.store, blob))
    by_file = ContentFile.at(str(tmp_path / "model.safetensors"), "init_from")
    by_blob = ContentFile.at(blob, "init_from")
    still = [replace(RECIPE, init_from=file, seed=6, **STILL) for file in (by_file, by_blob)]
    keys = {world.context("diffusion_prior", recipe).key for recipe in still}
    assert len(keys) == 1
    assert keys != {world.context("diffusion_prior", replace(still[0], init_from=None)).key}
    _, after = trained(world, still[0])
    before.pop("gamma")
    after.pop("gamma")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    made = stage.train(world.context("diffusion_prior", still[1]))
    assert made.recipe["init_from"] == blob


def test_a_clip_begins_with_a_clips_weights(world: World) -> None:
    recipe = ClipRecipe(samples=32, batch=16, lanes=8, model=CLIP_MODEL)
    first = stage.train(world.context("clip", recipe, inputs=("pairs", "captions", "filter")))
    file = ContentFile.at(first.blobs["open_clip_model.safetensors"], "")
    like = replace(recipe, seed=1, init_from=file, **STILL)
    again = weights(world, stage.train(world.context("clip", like, inputs=("pairs", "captions", "filter"))))
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights(world, first).items())


def test_weights_to_begin_with_are_not_held_while_a_checkpoint_is_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob, _ = trained(world, RECIPE)
    data, restore = read_blob(world.store, blob), Checkpoints.restore
    counts = []

    def counted(self: Checkpoints, state: TrainState, at_most: int) -> bool:
        counts.append(sys.getrefcount(data))
        return restore(self, state, at_most)

    monkeypatch.setattr(Checkpoints, "restore", counted)
    monkeypatch.setattr("pipeline.training.train.read_blob", lambda store, sha256: data)
    before = sys.getrefcount(data)
    trained(world, replace(RECIPE, init_from=ContentFile.at(blob, "init_from")))
    assert counts == [before]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no safetensors", "is not a safetensors file"),
        ({"x": torch.zeros(2)}, r"does not fit diffusion_prior\.model: missing: .* and \d+ more; unknown: x"),
    ],
)
def test_other_weights_are_refused(world: World, tmp_path: Path, content: object, words: str) -> None:
    file = tmp_path / "weights"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file(content, file)
    recipe = replace(RECIPE, init_from=ContentFile.at(str(file), "init_from"))
    with pytest.raises(UserError, match=rf"diffusion_prior\.init_from: {file} {words}"):
        trained(world, recipe)


def test_shapes_are_compared(world: World) -> None:
    blob, _ = trained(world, RECIPE)
    wider = replace(RECIPE, model=replace(MODEL, width=64), init_from=ContentFile.at(blob, "init_from"))
    with pytest.raises(UserError, match=r"does not fit diffusion_prior\.model: \S+ is \[\d.*\] and should be \["):
        trained(world, wider)


def test_a_blob_that_is_not_there_and_a_file_that_changed(world: World, tmp_path: Path) -> None:
    recipe = replace(RECIPE, init_from=ContentFile.at("0" * 64, "init_from"))
    with pytest.raises(UserError, match=r"diffusion_prior\.init_from: .*is missing in .*name a file, or a blob"):
        trained(world, recipe)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    named = ContentFile.at(str(file), "init_from")
    file.write_bytes(b"two")
    with pytest.raises(UserError, match="changed during this command"):
        trained(world, replace(RECIPE, init_from=named))
    assert put_blob(world.store, b"two") != named
