"""Counts the parameters and the arithmetic of a configuration's models. Exact, and nothing is computed.

PyTorch builds each model of tensors that have shapes and no values, runs a row through it and counts matrix products
and convolutions, as a training does (pipeline.training.timing). So a model that fits no machine here is counted too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import open_clip
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.ar_prior import ARPrior
from models.clip import config_of
from models.decoder import Decoder
from models.diffusion_prior import DiffusionPrior
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.prior_configs import ARPriorConfig, ClipConfig, DiffusionPriorConfig, TextTower
from models.upsampler import Upsampler
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.training.recipes import ClipRecipe
from pipeline.training.timing import flop_counter

NEEDED = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")  # of what open_clip says of a model


@dataclass(frozen=True)
class Size:
    """The size of a model.

    Attributes:
        forward: Floating-point operations of one row's forward pass, as training sees it, two per multiply-add.
        parameters: Number of parameters.
    """

    forward: float
    parameters: int

    @property
    def training(self) -> float:
        """Returns the operations of one training sample, by the usual count of three forward passes."""
        return 3 * self.forward


@dataclass(frozen=True)
class ClipSize:
    """Operations to embed one image and one caption, and the dimension of embeddings."""

    image: float
    text: float
    dim: int
    parameters: int


def count_model(config: Config, stage: str) -> Size:
    """Returns the size of the model that a stage trains. Raises UserError for a CLIP that open_clip does not know."""
    if stage == "clip":
        clip = count_clip(config.clip)
        return Size(clip.image + clip.text, clip.parameters)
    model = getattr(config, stage).model
    return _size(model, count_clip(config.clip).dim, config.codec.components, text_tower(model, config.clip))


def count_clip(recipe: ClipRecipe) -> ClipSize:
    """Returns the size of the CLIP that a recipe trains or names. Raises UserError as ``count_model`` does."""
    return _count(recipe.weights if recipe.pretrained else recipe.model)


def text_tower(model: Any, recipe: ClipRecipe) -> TextTower | None:
    """Returns the sizes of the text tower of a recipe's CLIP where a model of this configuration reads it frozen.

    Raises UserError as ``count_model`` does, and for a tower that it cannot read.
    """
    if getattr(model, "text_encoder", None) != "frozen":
        return None
    try:
        return TextTower.of(_open_clip_config(recipe.weights if recipe.pretrained else recipe.model))
    except ValueError as e:
        raise UserError(str(e)) from e


@lru_cache
def _size(model: Any, dim: int, codes: int, tower: TextTower | None) -> Size:
    with FakeTensorMode(), torch.no_grad():
        tokens, row = torch.zeros(1, 77, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        embedding, kept = torch.zeros(1, dim), torch.ones(1, dtype=torch.bool)
        network: torch.nn.Module
        inputs: tuple[torch.Tensor, ...]
        match model:
            case ARPriorConfig():
                network = ARPrior(model, dim, codes, tower)
                inputs = (tokens, embedding, row, torch.zeros(1, codes, dtype=torch.int64), kept)
            case DiffusionPriorConfig():
                network = DiffusionPrior(model, dim, tower)
                inputs = (embedding, row, tokens, embedding, kept)
            case DecoderConfig():
                network = Decoder(model, dim, tower)
                image = torch.zeros(1, 3, model.image_size, model.image_size)
                inputs = (image, row, embedding, tokens, kept, kept)
            case UpsamplerConfig():
                network = Upsampler(model)
                crop, low = model.crop_size, model.crop_size // model.scale
                inputs = (torch.zeros(1, 3, crop, crop), row, torch.zeros(1, 3, low, low))
            case _:
                raise TypeError(f"no size known for {type(model).__name__}")
        counter = flop_counter()
        with counter:
            network.eval().requires_grad_(False)(*inputs)
        return Size(counter.get_total_flops(), sum(p.numel() for p in network.parameters()))


@lru_cache
def _count(clip: ClipConfig | str) -> ClipSize:
    settings = _open_clip_config(clip)
    side = settings["vision_cfg"].get("image_size", 224)
    sides = (side, side) if isinstance(side, int) else tuple(side)
    with torch.device("meta"), torch.no_grad():
        kind = open_clip.CustomTextCLIP if "custom_text" in settings else open_clip.CLIP
        network = kind(**{name: settings[name] for name in NEEDED if name in settings}).eval().requires_grad_(False)
        image, text = flop_counter(), flop_counter()
        with image:
            network.encode_image(torch.zeros(1, 3, *sides))
        with text:
            network.encode_text(torch.zeros(1, network.context_length, dtype=torch.int64))
        parameters = sum(p.numel() for p in network.parameters())
    return ClipSize(image.get_total_flops(), text.get_total_flops(), settings["embed_dim"], parameters)


def _open_clip_config(clip: ClipConfig | str) -> dict[str, Any]:
    """Returns the configuration of a model of ours, of "open_clip:NAME:TAG", or of "local-dir:FOLDER"."""
    if isinstance(clip, ClipConfig):
        return clip.model_config()
    try:
        return config_of(clip)
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"clip.weights: {e}") from e
