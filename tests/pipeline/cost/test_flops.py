"""Sizes that are counted without computing, against the same models when they compute."""

from pathlib import Path

import pytest
import torch
from torch import nn

from models.clip import Clip
from models.codec import Codec
from models.frozen_text import FrozenTower
from models.random_streams import RandomStreams
from models.upsampler import training_low
from pipeline.config import TRAININGS, Config, load_config
from pipeline.cost.flops import count_clip, count_model
from pipeline.errors import UserError
from pipeline.training.task import Task
from pipeline.training.tasks.ar_prior import ARPriorTask
from pipeline.training.tasks.clip import ClipTask
from pipeline.training.tasks.decoder import DecoderTask
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask
from pipeline.training.tasks.upsampler import UpsamplerTask
from pipeline.training.timing import forward_flops

ROOT = Path(__file__).parents[3]
NANO = load_config(ROOT / "configs/nano.yaml")


def task_of(config: Config, stage: str) -> Task:
    recipe, dim, codes = getattr(config, stage), config.clip.model.embed_dim, config.codec.components
    clip = Clip.build(config.clip.model, 0)
    tower = FrozenTower.of(clip.model_config, clip.model.state_dict())
    if stage == "ar_prior":
        shapes = {"mean": (dim,), "components": (codes, dim), "variance": (codes,), "edges": (codes, 1023)}
        shapes |= {"values": (codes, 1024), "dot_edges": (1023,), "dot_counts": (1024,)}
        codec = Codec(**{name: torch.ones(s, dtype=torch.float64) for name, s in shapes.items()})
        return ARPriorTask(recipe.model, dim, codec, tower)
    kinds = {"diffusion_prior": DiffusionPriorTask, "decoder": DecoderTask}
    if stage in kinds:
        return kinds[stage](recipe.model, dim, tower)
    return (ClipTask if stage == "clip" else UpsamplerTask)(recipe.model)


@pytest.mark.parametrize("stage", TRAININGS)
def test_a_training_counts_the_same(stage: str) -> None:
    task = task_of(NANO, stage)
    model: nn.Module = task.model(0).eval()
    side, dim = max(task.image_size, 1), NANO.clip.model.embed_dim
    batch = {
        "image": torch.zeros(1, 3, side, side, dtype=torch.uint8),
        "tokens": torch.ones(1, 77, dtype=torch.int64),
        "image_embedding": torch.ones(1, dim),
        "text_embedding": torch.ones(1, dim),
    }
    rng = RandomStreams([(0, 1)])
    given = {name: batch[name] for name in task.columns}
    if isinstance(task, UpsamplerTask):  # degrading an image is not the model's work, and depends on the draw
        given["low"] = training_low(task.config, given, rng)
    counted = forward_flops(task, model, given, rng)
    size = count_model(NANO, stage)
    assert size.forward == pytest.approx(counted, rel=0.01)
    assert size.training == 3 * size.forward
    assert size.parameters == sum(p.numel() for p in model.parameters())


def test_a_clip_that_exists_is_known_by_its_name() -> None:
    size = count_clip(load_config(ROOT / "configs/paper.yaml").clip)
    assert (size.dim, size.parameters) == (768, 427_616_513)  # ViT-L/14
    assert size.image == pytest.approx(2 * 81e9, rel=0.01)  # 81 GMACs, as its authors' peers count
    with pytest.raises(UserError, match="open_clip has no model 'ViT-Q'"):
        count_clip(load_config(ROOT / "configs/paper.yaml", ["clip.weights=open_clip:ViT-Q:openai"]).clip)
    with pytest.raises(UserError, match=r"nowhere has no open_clip_config.json"):
        count_clip(load_config(ROOT / "configs/paper.yaml", ["clip.weights=local-dir:nowhere"]).clip)
