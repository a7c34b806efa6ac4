"""A training as the graph runs it: artefacts, resuming, milestones, and the one line that a mistake costs."""

import logging
import os
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from models.clip import Clip
from models.folder import load_model
from models.image_configs import UpsamplerConfig
from models.prior_configs import ARPriorConfig
from pipeline.errors import Superseded, UserError
from pipeline.graph.artifacts import Artifact, load_artifact, read_shards
from pipeline.graph.stages import trajectory_key, trunk_key
from pipeline.ledger import Ledger
from pipeline.settings import TrainingSettings
from pipeline.store.records import materialise, read_blob, read_record
from pipeline.training import stage
from pipeline.training.checkpoints import Checkpoints, last_attempt, open_checkpoints, take_attempt
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.feed.tables import Tables
from pipeline.training.recipes import ARPriorRecipe, ClipRecipe, DecoderRecipe, UpsamplerRecipe
from pipeline.training.results import Results
from pipeline.training.state import begin
from pipeline.training.task import task_of
from pipeline.training.train import Worker
from tests.pipeline.training.conftest import World, make_world, with_codec
from tests.pipeline.training.trainings import (
    CLIP_MODEL,
    DECODER,
    MODEL,
    RECIPE,
    SETTINGS,
    assert_close,
    lines,
    made,
    weights,
)


def test_a_training_leaves_a_model_and_its_metrics(shared_world: World, tmp_path: Path) -> None:
    ctx = shared_world.context("diffusion_prior", RECIPE)
    artifact = stage.train(ctx)
    assert (artifact.stage, artifact.key) == ("diffusion_prior", ctx.key)
    assert artifact.ledger == Ledger(kept=58)
    assert set(artifact.blobs) == {"config.json", "model.safetensors", "metrics.jsonl"}
    materialise(shared_world.store, artifact.blobs, tmp_path)
    assert load_model(tmp_path).config == MODEL
    journal = lines(shared_world, artifact)
    assert [line["samples"] for line in journal if "loss" in line] == list(range(16, 193, 16))
    first, last = (line for line in journal if "validation_loss" in line)
    assert (first["samples"], last["samples"]) == (0, 192)
    assert last["validation_loss"] < 0.9 * first["validation_loss"]
    assert artifact.metrics["validation_loss"] == journal[-1]["validation_loss"]
    assert artifact.metrics["samples_seen"] == 192
    assert artifact.metrics["validation_condition_gap"] > 3 * artifact.metrics["validation_condition_gap_error"]
    assert artifact.times["samples_per_second"] > 0
    assert artifact.environment["device"] == "cpu"


def test_a_decoder_measures_its_whitening_on_kept_training_rows(tmp_path: Path) -> None:
    """One that goes on keeps what it measured, and the model that is published has it."""
    world = make_world(tmp_path)
    recipe = DecoderRecipe(samples=16, batch=8, lanes=4, precision="fp32", model=replace(DECODER, whiten=True))
    for samples in (16, 32):
        artifact = stage.train(world.context("decoder", replace(recipe, samples=samples)))
    rows = Tables(world.store, world.inputs, ("image_embedding",), "train", 0).first(1000)
    mean = sum(torch.from_numpy(row.image_embedding) for row in rows) / len(rows)
    found = weights(world, artifact)
    torch.testing.assert_close(found["whitening.mean"], mean, atol=1e-6, rtol=0)
    assert {world.examples[row.key].split for row in rows} == {"train"}
    assert not torch.equal(found["whitening.matrix"], torch.eye(len(mean)))


def test_the_decoder_draws_previews(shared_world: World) -> None:
    recipe = DecoderRecipe(samples=32, batch=16, lanes=8, precision="fp32", model=DECODER)
    settings = TrainingSettings(threads=1, device="cpu", milestones=(16,))
    artifact = stage.train(shared_world.context("decoder", recipe, settings))
    previews = {"preview.png", *(f"previews/{samples:012d}.png" for samples in (0, 16, 32))}
    assert previews | {"config.json", "model.safetensors", "metrics.jsonl"} == set(artifact.blobs)
    assert artifact.blobs["preview.png"] == artifact.blobs["previews/000000000032.png"]
    assert read_blob(shared_world.store, artifact.blobs["preview.png"]).startswith(b"\x89PNG")
    assert {"loss", "mse", "vb", "gradient_norm", "validation_condition_gap"} <= artifact.metrics.keys()
    early = shared_world.context("decoder", replace(recipe, samples=16))
    assert made(shared_world, early).metrics["samples_seen"] == 16


def test_an_upsampler_needs_no_captions(shared_world: World) -> None:
    model = UpsamplerConfig(
        low_size=16, image_size=64, channels=8, depth=1, multipliers=(1, 2), steps=50, patch=2, prediction="x0"
    )
    recipe = UpsamplerRecipe(samples=32, batch=16, lanes=8, model=model)
    inputs = ("pairs", "curation")
    artifact = stage.train(shared_world.context("upsampler_256", recipe, inputs=inputs))
    assert artifact.stage == "upsampler_256"
    assert "preview.png" in artifact.blobs
    # It begins with the small image enlarged, so another row's costs much from the first.
    first, last = (line for line in lines(shared_world, artifact) if "validation_loss" in line)
    for line in (first, last):
        assert line["validation_condition_gap"] > line["validation_loss"] > 0


def test_clip_trains_before_there_is_a_curation(shared_world: World, tmp_path: Path) -> None:
    recipe = ClipRecipe(samples=64, batch=16, lanes=8, model=CLIP_MODEL)
    inputs = ("pairs", "captions", "filter")
    artifact = stage.train(shared_world.context("clip", recipe, inputs=inputs))
    assert set(artifact.blobs) == {"open_clip_config.json", "open_clip_model.safetensors", "metrics.jsonl"}
    kept = sum(shard.counts["train/0"] for shard in read_shards(shared_world.store, shared_world.inputs["filter"]))
    assert artifact.ledger == Ledger(kept=kept)
    materialise(shared_world.store, artifact.blobs, tmp_path)
    clip = Clip.from_folder(tmp_path)
    assert clip.embed_dim == 16
    assert 2 < clip.model.token_embedding.weight.any(1).sum() < 100  # only tokens of captions say anything
    taken = ClipRecipe(weights=f"local-dir:{tmp_path}")  # and what stands in a folder can be taken as it is
    other = stage.train(shared_world.context("clip", taken, inputs=inputs))
    assert other.blobs["open_clip_model.safetensors"] == artifact.blobs["open_clip_model.safetensors"]
    assert "samples_seen" not in other.metrics  # by which tables tell that nothing was trained
    with pytest.raises(UserError, match=r"clip\.weights: .*open_clip_config\.json"):
        stage.train(shared_world.context("clip", ClipRecipe(weights="local-dir:/nowhere"), inputs=inputs))


def test_the_ar_prior_uses_the_codec(shared_world: World) -> None:
    world = with_codec(shared_world)
    model = ARPriorConfig(
        text_context=16, prefix=8, text_width=32, text_depth=1, text_heads=2, width=32, depth=1, heads=2, buckets=8
    )
    recipe = ARPriorRecipe(samples=32, batch=16, lanes=8, model=model)
    inputs = ("pairs", "captions", "embeddings", "curation", "codec")
    metrics = stage.train(world.context("ar_prior", recipe, inputs=inputs)).metrics
    assert 0 < metrics["loss"] < 3 * 2.08  # nats; a uniform guess has log 8 = 2.08
    assert metrics["validation_nats_below_uniform"] == pytest.approx(log(8) - metrics["validation_loss"])
    wrong = replace(recipe, model=replace(model, buckets=16))
    with pytest.raises(UserError, match=r"ar_prior\.model\.buckets: 16, but the codec has 8"):
        stage.train(world.context("ar_prior", wrong, inputs=inputs))


# --- resuming ---------------------------------------------------------------------------------------------------------

MILESTONES = replace(SETTINGS, milestones=(32, 58))  # the second within a batch, which ends at 64
SHORT = replace(RECIPE, samples=96)
POINTS = ("checkpoint.before_record", "checkpoint.after_record", "training.before_artifact", "artifact.before_record")


def train_until_killed(folder: Path) -> None:
    """Trains in a process that is killed at the first of the points at which none before it was."""
    world = make_world(folder / "store")
    os.environ["UNCLIP_CRASH"] = ",".join(f"{point}@{folder / point}" for point in POINTS)
    stage.train(world.context("diffusion_prior", SHORT, MILESTONES))


def results(world: World) -> dict[str, bytes]:
    """All blobs of all diffusion priors in a store, by samples and name."""
    found: dict[str, Any] = {}
    for entry in world.store.list("artifacts/diffusion_prior/"):
        record = read_record(world.store, entry.path, Artifact)
        samples = record.recipe["samples"]
        found |= {f"{samples} {name}": read_blob(world.store, blob) for name, blob in record.blobs.items()}
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a training in one go leaves: a model and two milestones."""
    world = make_world(tmp_path_factory.mktemp("undisturbed"))
    stage.train(world.context("diffusion_prior", SHORT, MILESTONES))
    return results(world)


@pytest.mark.integration
def test_killed_at_every_point_and_started_again_the_bytes_are_the_same(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """kill -9, then the same call: weights, journal and milestone equal an undisturbed training's, bit for bit."""
    for kills in range(len(POINTS) + 1):
        process = multiprocessing.get_context("forkserver").Process(target=train_until_killed, args=(tmp_path,))
        process.start()
        process.join()
        assert process.exitcode == (-9 if kills < len(POINTS) else 0)
    assert all((tmp_path / point).exists() for point in POINTS)
    world = make_world(tmp_path / "store")
    assert results(world) == undisturbed
    assert len(undisturbed) == 9


def test_raising_samples_goes_on_and_a_milestone_is_the_artefact_of_the_shorter_recipe(
    world: World, undisturbed: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped twice on the way it ends bit for bit as in one go, and what it left there are that one's milestones."""
    contexts = [world.context("diffusion_prior", replace(SHORT, samples=samples), SETTINGS) for samples in (32, 58, 96)]
    assert len({trajectory_key(ctx) for ctx in contexts}) == 1
    assert len({ctx.key for ctx in contexts}) == 3
    contexts[-1] = replace(contexts[-1], settings=replace(SETTINGS, milestones=(16,)))
    with caplog.at_level(logging.INFO):
        seen = [stage.train(ctx).metrics["samples_seen"] for ctx in contexts]
    assert seen == [32, 64, 96]
    for reached in (32, 64):
        assert f"resuming diffusion_prior at sample {reached}" in caplog.text
    told = [record.getMessage() for record in caplog.records if "milestone" in record.getMessage()]
    assert told == [
        "diffusion_prior: the milestone at 16 samples is before the checkpoint that is resumed, and is not made"
    ]
    assert results(world) == undisturbed


def test_an_end_within_a_batch_is_found_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """26 samples in batches of 16 end at 32; killed there, a training goes on there, though it keeps no other."""
    ctx = world.context("diffusion_prior", replace(RECIPE, samples=26), replace(SETTINGS, keep_checkpoints=1))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Results, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.train(ctx)
    with caplog.at_level(logging.INFO):
        assert stage.train(ctx).metrics["samples_seen"] == 32
    assert "resuming diffusion_prior at sample 32" in caplog.text


def test_a_second_start_takes_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = world.context("diffusion_prior", replace(RECIPE, samples=48), SETTINGS)
    publish = Checkpoints.publish

    def publish_after_another_began(self: Any, taken: Any, *rest: Any) -> None:
        if taken.samples == 32 and self.attempt == 1:
            take_attempt(world.store, trajectory_key(ctx))
        publish(self, taken, *rest)

    monkeypatch.setattr(Checkpoints, "publish", publish_after_another_began)
    with pytest.raises(Superseded, match="attempt 2 has begun"):
        stage.train(ctx)
    assert load_artifact(world.store, "diffusion_prior", ctx.key) is None
    stage.train(ctx)
    assert last_attempt(world.store, trajectory_key(ctx)) == 3


def test_seeds_change_weights_and_settings_do_not(world: World) -> None:
    def trained(recipe: Any, settings: TrainingSettings) -> Artifact:
        return stage.train(world.context("diffusion_prior", recipe, settings))

    recipe = replace(RECIPE, samples=32, precision="fp32")
    whole = trained(recipe, SETTINGS)
    other = trained(replace(recipe, seed=1), SETTINGS)
    assert other.blobs["model.safetensors"] != whole.blobs["model.safetensors"]
    cut = trained(replace(recipe, samples=31), replace(SETTINGS, micro_batch=5, keep_checkpoints=1))
    assert_close(weights(world, cut), weights(world, whole))


def test_a_falling_rate_branches_off(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Made from a training whose rate stays, it equals one in one go, bit for bit, and leaves that training alone."""
    settings = replace(SETTINGS, keep_checkpoints=20, milestones=(16,))
    rising, falling = replace(RECIPE, samples=64), replace(RECIPE, samples=80, decay=48)
    contexts = [world.context("diffusion_prior", recipe, settings) for recipe in (rising, falling)]
    assert trajectory_key(contexts[0]) == trunk_key(contexts[0]) == trunk_key(contexts[1])
    longer = world.context("diffusion_prior", replace(falling, samples=96), settings)
    assert len({trajectory_key(ctx) for ctx in (*contexts, longer)}) == 3
    stage.train(contexts[0])
    with caplog.at_level(logging.INFO):
        branched = stage.train(contexts[1])
    assert "resuming diffusion_prior at sample 32" in caplog.text
    fresh = make_world(tmp_path / "fresh")
    straight = stage.train(fresh.context("diffusion_prior", falling, settings))
    assert branched.key == straight.key
    assert branched.blobs == straight.blobs
    made(fresh, fresh.context("diffusion_prior", replace(RECIPE, samples=16)))  # a milestone of the trunk
    with caplog.at_level(logging.INFO):
        stage.train(world.context("diffusion_prior", replace(RECIPE, samples=80), settings))
    assert "resuming diffusion_prior at sample 64" in caplog.text


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TrainingSettings(workers=17), r"run\.diffusion_prior\.workers: 17 is more than the 16 rows"),
        (TrainingSettings(milestones=(8,)), r"run\.diffusion_prior\.milestones: 8 is not between one batch \(16\)"),
        (TrainingSettings(milestones=(100_000,)), r"milestones: 100,000 is not between .* samples \(192\)"),
        (TrainingSettings(milestones=(192,)), r"milestones: 192 is not between .* samples \(192\)"),
    ],
)
def test_settings_that_cannot_work_are_refused(shared_world: World, settings: TrainingSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stage.train(shared_world.context("diffusion_prior", RECIPE, settings))


RESNET = replace(CLIP_MODEL, tower="resnet", layers=(1, 1, 1, 1), width=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            TrainingSettings(micro_batch=4),
            r"run\.clip\.micro_batch: batch norms of a resnet tower need the whole batch",
        ),
        (TrainingSettings(workers=2), r"run\.clip\.workers: 2; batch norms of a resnet tower"),
        (TrainingSettings(workers=2, sharded=True), r"run\.clip\.sharded: a CLIP's temperature is one number"),
    ],
)
def test_a_clip_compares_its_whole_batch(shared_world: World, settings: TrainingSettings, message: str) -> None:
    recipe = ClipRecipe(samples=64, batch=16, lanes=8, model=CLIP_MODEL if settings.sharded else RESNET)
    with pytest.raises(UserError, match=message):
        stage.train(shared_world.context("clip", recipe, settings, inputs=("pairs", "captions", "filter")))


def test_no_rows_are_explained(shared_world: World) -> None:
    recipe = UpsamplerRecipe(samples=64, batch=16, lanes=8)
    with pytest.raises(
        UserError, match=r"upsampler_256: no training rows; .*short side of 256 px.* bundle\.sampling\.size=64"
    ):
        stage.train(shared_world.context("upsampler_256", recipe, inputs=("pairs", "curation")))


def test_workers_begin_where_all_of_them_can(world: World) -> None:
    """Another worker finds no newer checkpoint than that, or none."""
    reached = 0

    class Beside(ProcessGroup):
        def collect(self, items: list[Any], group: Any = None) -> list[Any]:
            return [items[0], min(items[0], reached)]

    settings = replace(SETTINGS, keep_checkpoints=9)
    ctx = world.context("diffusion_prior", replace(RECIPE, samples=32), settings)
    stage.train(ctx)
    worker, task = Worker(ctx, open_checkpoints(ctx, begin=False)), task_of(ctx)
    for reached in (16, 0):
        state = worker.restored(task, Beside())
        assert state.samples == reached
        expected = begin(task, ctx.recipe, ProcessGroup())
        worker.checkpoints.restore(expected, reached)
        found, wanted = state.model.state_dict(), expected.model.state_dict()
        assert all(found[name].equal(wanted[name]) for name in wanted)
