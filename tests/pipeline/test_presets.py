import dataclasses
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from models.ar_prior import ARPrior
from models.clip import config_of
from models.decoder import Decoder
from models.diffusion_prior import DiffusionPrior
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.prior_configs import ARPriorConfig, ClipConfig, DiffusionPriorConfig, TextTower
from models.upsampler import Upsampler
from pipeline.build import build as build_graph
from pipeline.config import PRESETS, TRAININGS, make_config, preset_config
from pipeline.graph.stages import Graph

ROOT = Path(__file__).parents[2]


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def build(name: str) -> dict[str, Any]:
    """Every model of a preset, on the meta device."""
    preset = preset_config(name)
    sizes = config_of(preset.clip.weights) if preset.clip.pretrained else preset.clip.model.model_config()
    dim, tower = sizes["embed_dim"], TextTower.of(sizes)
    with torch.device("meta"):
        return {
            "clip": open_clip.CLIP(**sizes),
            "ar_prior": ARPrior(preset.ar_prior.model, dim, min(319, dim), tower),
            "diffusion_prior": DiffusionPrior(preset.diffusion_prior.model, dim, tower),
            "decoder": Decoder(preset.decoder.model, dim, tower),
            "upsampler_256": Upsampler(preset.upsampler_256.model),
            "upsampler_1024": Upsampler(preset.upsampler_1024.model),
        }


def graph_of(name: str, **values: Any) -> Graph:
    """The stages of a configuration of nothing but a preset and these values."""
    values |= {"project": name, "store": name, "source": {"paths": [name]}, "preset": name}
    return build_graph(make_config(values))


def test_every_file_of_a_preset_is_one_that_a_configuration_may_name() -> None:
    assert {file.stem for file in (ROOT / "pipeline/presets").iterdir()} == set(PRESETS)


def test_the_paper_preset_has_the_papers_sizes() -> None:
    models = build("paper")
    # Table 3 says 1B, 1B, 3.5B, 700M and 300M. The AR prior's 1B is its transformer over codes; the text encoder that
    # Table 3 gives it as well has 1.2B more, and a token table 0.1B.
    ar_prior = models["ar_prior"]
    assert millions(ar_prior.transformer) == pytest.approx(798, abs=1)
    assert millions(ar_prior.text_encoder) == pytest.approx(1209, abs=1)
    assert millions(models["diffusion_prior"].transformer) == pytest.approx(1209, abs=1)
    assert millions(models["decoder"]) == pytest.approx(3500, rel=0.05)
    assert millions(models["upsampler_256"]) == pytest.approx(700, rel=0.05)
    assert millions(models["upsampler_1024"]) == pytest.approx(300, rel=0.07)


def test_small_presets_are_small() -> None:
    assert all(millions(model) < 5 for model in build("nano").values())
    assert all(millions(model) < 20 for model in build("tiny").values())
    assert sum(millions(model) for model in build("small").values()) < 1000


def test_class_defaults_are_the_paper() -> None:
    paper = preset_config("paper")
    assert paper.ar_prior.model == ARPriorConfig()
    assert paper.diffusion_prior.model == DiffusionPriorConfig()
    assert paper.decoder.model == DecoderConfig()
    assert paper.upsampler_256.model == UpsamplerConfig()
    assert ARPriorConfig().prefix + 2 + 319 == 384  # Table 3's context


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (ARPriorConfig(), {"width": 100}, "width 100 is not a multiple of heads 26"),
        (ARPriorConfig(), {"text_depth": 0}, "text_depth is 0"),
        (ARPriorConfig(), {"prefix": 78}, "prefix is 78: use 1 to text_context, which is 77"),
        (ARPriorConfig(), {"text_context": 256}, "text_context is 256: use 3 to 77"),
        (ARPriorConfig(), {"buckets": 1}, "buckets is 1"),
        (ARPriorConfig(), {"dropout": 1.0}, "dropout is 1.0"),
        (ARPriorConfig(), {"drop_text": -0.1}, "drop_text is -0.1"),
        (DiffusionPriorConfig(), {"schedule": "cosin"}, "schedule is 'cosin': use 'cosine' or 'linear'"),
        (DiffusionPriorConfig(), {"steps": 1}, "steps is 1"),
        (DiffusionPriorConfig(), {"scale": 0.0}, "scale is 0.0"),
        (ClipConfig(), {"tower": "vitt"}, "tower is 'vitt'"),
        (ClipConfig(), {"layers": (2, 2, 2, 2)}, "a vit takes one number"),
        (ClipConfig(), {"tower": "resnet"}, "a resnet takes four numbers"),
        (ClipConfig(), {"embed_dim": 512}, "embed_dim 512 is above width 256"),
        (ClipConfig(), {"patch": 7}, "image_size 64 is not a multiple of patch 7"),
        (ClipConfig(), {"width": 300}, "width is 300"),
        (ClipConfig(), {"text_context": 78}, "text_context is 78: use 3 to 77"),
        (preset_config("tiny").clip.model, {"image_size": 48}, "image_size is 48: a resnet takes multiples of 32"),
    ],
)
def test_impossible_values_are_refused_by_name(config: Any, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


@pytest.mark.parametrize("name", ["small", "karlo"])
def test_captions_are_read_through_the_clip_of_the_run(name: str) -> None:
    """Own text or another's: nothing in these models learns a table of tokens."""
    models = build(name)
    for model in ("diffusion_prior", "decoder"):
        tables = [module for module in models[model].modules() if isinstance(module, nn.Embedding)]
        assert tables
        assert not any(table.weight.requires_grad for table in tables)


@pytest.mark.parametrize("name", PRESETS)
def test_what_sampling_does_not_take_is_trained_in_the_demos_and_the_paper_alone(name: str) -> None:
    """Nano and tiny are small enough to show both priors, and the paper compares them."""
    both = name in ("nano", "tiny", "paper")
    assert preset_config(name).bundle.sampling.prior == "diffusion"
    assert {stage in graph_of(name) for stage in ("codec", "ar_prior")} == {both}


@pytest.mark.parametrize("name", ["small", "karlo"])
def test_one_line_turns_the_ar_prior_on(name: str) -> None:
    asked = ["ar_prior", *preset_config(name).bundle.models]
    graph = graph_of(name, bundle={"models": asked})
    assert {"codec", "ar_prior"} == graph.keys() - graph_of(name).keys()
    assert graph["bundle"].inputs[:3] == ("clip", "codec", "ar_prior")


@pytest.mark.parametrize("name", ["small", "karlo", "paper"])
def test_large_trainings_warm_up_and_clip_gradients_however_short_they_are(name: str) -> None:
    whole = {"project": name, "store": name, "source": {"paths": [name]}, "preset": name}
    for config in (make_config(whole), make_config(whole | {"scale": 0.02})):
        for stage in (stage for stage in TRAININGS if not getattr(config, stage).pretrained):
            recipe = getattr(config, stage)
            assert recipe.clip_norm == 1.0
            assert 100 <= recipe.warmup_steps <= recipe.samples / recipe.batch / 2
