"""What a step takes of a GPU, and the settings that let it fit."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.cost.devices import DEVICES, Fleet
from pipeline.cost.estimate import LAUNCH_SECONDS, PlanInput, estimate, step_of, step_seconds, worker_memory
from pipeline.cost.flops import Size, count_model
from pipeline.cost.limits import lacking, too_large
from pipeline.cost.memory import USABLE, Footprint, footprint, host_memory, settings_that_fit
from pipeline.cost.table import remarks, size, worth_renting
from pipeline.graph.resources import Machine
from pipeline.settings import STATE_BYTES, TrainingSettings
from pipeline.store import open_store
from pipeline.training.recipes import ClipRecipe, DecoderRecipe
from tests.pipeline.cost.asks import PAPER, again, asked, paper

GB = 1e9
SIZE = Size(forward=1e12, parameters=10**9, activations=1 * GB, recomputed=0.1 * GB, kernels=1000, layers=20)
RECIPE = DecoderRecipe(batch=256)
PLAIN = TrainingSettings()
HELD = (STATE_BYTES + 2) * GB  # with weights in bf16


def of(
    recipe: DecoderRecipe | ClipRecipe = RECIPE, workers: int = 8, memory: float = 80 * GB, **changes: object
) -> Footprint:
    return footprint(SIZE, recipe, replace(PLAIN, **changes), workers, memory)


def test_as_many_rows_are_computed_at_once_as_fit() -> None:
    assert of() == Footprint(32, 32, HELD + 32 * GB, fits=True)
    assert (of(workers=3).rows, of(workers=3).at_once) == (86, 43)
    assert of(memory=30 * GB) == Footprint(32, 4, HELD + 4 * GB, fits=True)
    assert of(memory=30 * GB).passes == 8
    assert of(micro_batch=5).at_once == 5
    assert of(memory=(HELD + 0.9 * GB) / USABLE) == Footprint(32, 1, HELD + GB, fits=False)
    assert of(replace(RECIPE, precision="fp32")).at_once == 16
    assert of(recompute=True).memory == pytest.approx(HELD + 3.2 * GB)


def test_a_sharded_state_lies_over_a_node_where_half_of_it_has_room() -> None:
    layers = 2 * 2 * GB / SIZE.layers
    assert of(workers=64, sharded=True).memory == pytest.approx(STATE_BYTES * GB / 8 + layers + 4 * GB)
    assert of(workers=64, sharded=True, memory=4 * GB).memory == pytest.approx(STATE_BYTES * GB / 64 + layers + 2 * GB)
    assert of(workers=64, sharded=True, offload=True).memory == pytest.approx(layers + 4 * GB)


def test_a_contrastive_loss_holds_its_logits_and_encodes_rows_in_parts() -> None:
    clip = ClipRecipe(batch=32_768)
    assert of(clip, workers=64, memory=75 * GB).at_once == 32
    resnet = replace(clip, model=replace(clip.model, tower="resnet", layers=(1, 1, 1, 1)))
    assert of(resnet, workers=64) == Footprint(512, 512, of(clip, 64, 1e15).memory, fits=False)
    assert settings_that_fit("clip", SIZE, resnet, PLAIN, 64, 100 * GB) == "run.clip.recompute=true"


def test_the_cheapest_setting_that_lets_a_training_fit_is_named() -> None:
    def found(memory: float, workers: int = 8) -> str:
        return settings_that_fit("decoder", SIZE, RECIPE, PLAIN, workers, memory * GB)

    assert found(25) == "run.decoder.recompute=true"  # one row is too many
    assert found(10) == "run.decoder.sharded=true"  # so is the state
    assert found(3.5) == "run.decoder.sharded=true run.decoder.recompute=true"
    assert found(0.5) == "run.decoder.sharded=true run.decoder.offload=true run.decoder.recompute=true"
    assert found(0.1) == found(10, workers=1) == ""


def test_what_cannot_fit_is_refused_with_the_setting_that_lets_it_fit() -> None:
    """Of the paper's decoder, whose state alone takes 78 GB, with the settings that the refusal names."""
    ask = asked(paper("run.decoder.sharded=false"), 10**6, Fleet(8, "H100"))
    costs = {stage: estimate(stage, ask) for stage in ("decoder", "diffusion_prior")}
    (lack,) = too_large(costs, ask)
    assert lack.what.startswith("decoder takes ")
    assert lack.what.endswith(" of a GPU for 1 row at once, and one H100 has 80 GB, 72 GB beside CUDA's own")
    assert lack.advice == "set run.decoder.sharded=true"
    assert list(too_large(costs, again(ask, PAPER))) == []
    assert list(too_large(costs, replace(ask, fleet=Fleet(8, "B200")))) == []
    # Of a kind that nobody knows the memory is not known either.
    unknown = replace(ask, fleet=None, machine=replace(ask.machine, gpus=8, gpu="NVIDIA X1"))
    assert list(too_large({"decoder": estimate("decoder", unknown)}, unknown)) == []


def test_where_no_setting_lets_it_fit_the_smallest_gpu_that_has_room_is_named() -> None:
    """For the paper's decoder and a card that people have at home; nothing smaller than what is named has room."""
    ask = asked(paper("run.decoder.sharded=false"), 10**6, Fleet(1, "RTX 3060"))

    def lacks(kind: str) -> list[str]:
        one = replace(ask, fleet=Fleet(1, kind))
        return [lack.advice for lack in too_large({"decoder": estimate("decoder", one)}, one)]

    (advice,) = lacks("RTX 3060")
    named = re.fullmatch(r"take 1 (.+), or a smaller preset", advice)
    assert named
    assert lacks(named[1]) == []
    assert all(lacks(kind) for kind, device in DEVICES.items() if device.memory < DEVICES[named[1]].memory)


def test_workers_that_fill_the_memory_of_their_host_are_refused_with_the_setting_that_lets_them_fit(
    tmp_path: Path,
) -> None:
    config = paper("run.upsampler_256.cache_mb=40000")
    ask = replace(asked(config, 10**6), machine=Machine(64, 8, "NVIDIA H100", 1e15), looked=True)
    costs = {"upsampler_256": estimate("upsampler_256", ask)}
    store = open_store(str(tmp_path))

    def lacks(memory: float, ask: PlanInput = ask) -> list[str]:
        there = replace(ask, machine=replace(ask.machine, memory=memory))
        return [str(lack) for lack in lacking(costs, there, store) if "of memory for" in str(lack)]

    one = worker_memory("upsampler_256", ask, 8)
    assert lacks(8 * one) == []
    takes = f"upsampler_256 takes {size(8 * one)} of memory for 8 workers, and the machines have "
    (said,) = lacks(8 * one - 1)
    assert said == f"{takes}{size(8 * one - 1)}; set run.upsampler_256.cache_mb=0"
    bare = replace(ask, config=paper("run.upsampler_256.cache_mb=0"))
    least = worker_memory("upsampler_256", bare, 8)
    assert lacks(8 * least - 1, bare)[0].endswith("; set run.upsampler_256.workers=7")
    assert lacks(1e9, bare)[0].endswith("; take machines with more memory, or a smaller model")
    assert lacks(1e9, replace(bare, machine=replace(ask.machine, grows=True))) == []


def test_clip_of_the_paper_fits_without_a_setting() -> None:
    gpus = 8
    ask = asked(paper("clip.weights=train"), 10**6, Fleet(gpus, "H100"))
    step = step_of("clip", ask, gpus)
    assert step.rows == 32_768 // gpus
    assert 8 <= step.at_once < step.rows
    assert step.memory < 72 * GB
    computing, launching = step_seconds("clip", ask, gpus)
    counted = count_model(ask.config, "clip")
    assert computing == pytest.approx(step.rows * 4 * counted.forward / (0.3 * ask.device.peak))  # once more, in parts
    assert launching == pytest.approx(step.passes * 4 * counted.kernels * LAUNCH_SECONDS)


def test_a_small_batch_on_many_gpus_waits_for_launches_and_the_plan_says_how_many_pay(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(
        "{project: s, preset: small, store: s, source: {paths: [a.csv]}, clip: {weights: 'open_clip:ViT-B-32:openai'}}"
    )
    config = load_config(file)
    ask = replace(asked(config, 10**6), fleet=Fleet(64, "H100"))
    cost = estimate("decoder", ask)
    assert cost.gpus == 64
    computing, launching = step_seconds("decoder", ask, 64)
    assert launching > computing
    assert cost.seconds > config.decoder.samples / config.decoder.batch * launching
    worth = worth_renting("decoder", ask, 64)
    assert 1 < worth < 64
    fewer = [estimate("decoder", replace(ask, fleet=Fleet(n, "H100"))).seconds for n in (worth // 2, worth, 2 * worth)]
    assert fewer[1] < 0.75 * fewer[0]
    assert fewer[2] > 0.75 * fewer[1]
    said = "\n".join(remarks({"decoder": cost}, ask))
    assert f"decoder: {worth} of 64 GPUs are worth renting" in said
    assert "to launch the kernels of a step" in said
    short = "\n".join(remarks({"decoder": cost}, ask, verbose=False))
    assert "decoder: steps are so small that a faster GPU would not be quicker" in short
    assert "kernels" not in short
    assert "assumed: " not in short
    assert worth_renting("decoder", replace(ask, fleet=Fleet(2, "H100")), 2) == 2


def test_a_host_holds_windows_of_images_and_the_tables_of_its_lanes() -> None:
    recipe = replace(RECIPE, lanes=64)
    settings = replace(PLAIN, cache_mb=0)

    def taken(workers: int, image: float, shard: float) -> float:
        return host_memory(SIZE, recipe, settings, workers, image, shard) - host_memory(
            SIZE, recipe, settings, workers, 0, 0
        )

    assert taken(1, 100e3, 0) == pytest.approx(64 * 1.25 * 256 * 100e3)
    assert taken(1, 0, 1e6) == pytest.approx(128e6)
    assert taken(64, 100e3, 0) == pytest.approx(2 * 1.25 * 256 * 100e3)  # a lane of its own, or parts of two
    sharded = replace(settings, sharded=True)
    whole, part = (host_memory(SIZE, recipe, each, 8, 0, 0) for each in (settings, sharded))
    assert whole - part == pytest.approx(12 * GB)  # 16 bytes a parameter of a checkpoint, or the model once
