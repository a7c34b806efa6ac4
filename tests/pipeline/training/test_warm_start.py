"""Beginning with weights that exist."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from models.prior_configs import ClipConfig, DiffusionPriorConfig
from pipeline.errors import UserError
from pipeline.parse import ContentFile
from pipeline.settings import TrainingSettings
from pipeline.store.records import put_blob, read_blob
from pipeline.training import stage
from pipeline.training.recipes import ClipRecipe, DiffusionPriorRecipe
from tests.pipeline.training.conftest import World

MODEL = DiffusionPriorConfig(text_context=16, width=32, depth=1, heads=2)
RECIPE = DiffusionPriorRecipe(samples=32, batch=16, lanes=8, model=MODEL, precision="fp32", seed=5)
STILL = {"learning_rate": 1e-30, "weight_decay": 0.0}
SETTINGS = TrainingSettings(threads=1, device="cpu")


def weights(world: World, recipe: DiffusionPriorRecipe) -> tuple[str, dict[str, torch.Tensor]]:
    """The blob of a trained prior's weights, and the weights."""
    blob = stage.train(world.context("diffusion_prior", recipe, SETTINGS)).blobs["model.safetensors"]
    return blob, load(read_blob(world.store, blob))


def test_a_training_begins_with_the_weights_of_another(world: World, tmp_path: Path) -> None:
    """Named by file or by blob: one key, and with a learning rate near 0 the same weights come out."""
    blob, before = weights(world, RECIPE)
    (tmp_path / "model.safetensors").write_bytes(read_blob(world.store, blob))
    by_file = ContentFile.at(str(tmp_path / "model.safetensors"), "init_from")
    by_blob = ContentFile.at(blob, "init_from")
    still = [replace(RECIPE, init_from=file, seed=6, **STILL) for file in (by_file, by_blob)]
    keys = {world.context("diffusion_prior", recipe).key for recipe in still}
    assert len(keys) == 1
    assert keys != {world.context("diffusion_prior", replace(still[0], init_from=None)).key}
    _, after = weights(world, still[0])
    before.pop("gamma")
    after.pop("gamma")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    made = stage.train(world.context("diffusion_prior", still[1], SETTINGS))
    assert made.recipe["init_from"] == blob


def test_a_clip_begins_with_a_clips_weights(world: World) -> None:
    model = ClipConfig(
        embed_dim=16, image_size=32, layers=(1,), width=32, patch=16, text_width=32, text_layers=1, text_heads=1
    )
    recipe = ClipRecipe(samples=32, batch=16, lanes=8, model=model)

    def blob(recipe: ClipRecipe) -> str:
        made = stage.run_clip(world.context("clip", recipe, SETTINGS, inputs=("pairs", "captions")))
        return made.blobs["open_clip_model.safetensors"]

    first = blob(recipe)
    again = blob(replace(recipe, seed=1, init_from=ContentFile.at(first, ""), **STILL))
    tensors = [load(read_blob(world.store, name)) for name in (first, again)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


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
        weights(world, recipe)


def test_shapes_are_compared(world: World) -> None:
    blob, _ = weights(world, RECIPE)
    wider = replace(RECIPE, model=replace(MODEL, width=64), init_from=ContentFile.at(blob, "init_from"))
    with pytest.raises(UserError, match=r"does not fit diffusion_prior\.model: \S+ is \[\d.*\] and should be \["):
        weights(world, wider)


def test_a_blob_that_is_not_there_and_a_file_that_changed(world: World, tmp_path: Path) -> None:
    recipe = replace(RECIPE, init_from=ContentFile.at("0" * 64, "init_from"))
    with pytest.raises(UserError, match=r"diffusion_prior\.init_from: .*is missing in .*name a file, or a blob"):
        weights(world, recipe)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    named = ContentFile.at(str(file), "init_from")
    file.write_bytes(b"two")
    with pytest.raises(UserError, match="has changed since it was named"):
        weights(world, replace(RECIPE, init_from=named))
    assert put_blob(world.store, b"two") != named
