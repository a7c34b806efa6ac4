"""Counts parameters, arithmetic, memory and kernels of a configuration's models; nothing is computed.

PyTorch builds each model of tensors that have shapes and no values, runs rows through it and counts matrix products and
convolutions, as a training does (pipeline.training.timing). So a model that fits no machine here is counted too. These
counts are exact; what a GPU keeps and launches is estimated from what a CPU would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.ar_prior import ARPrior
from models.clip import config_of
from models.decoder import Decoder
from models.diffusion_prior import DiffusionPrior
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.prior_configs import ARPriorConfig, ClipConfig, DiffusionPriorConfig, TextTower
from models.upsampler import Upsampler
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.training.distributed.sharding import layers
from pipeline.training.recipes import ClipRecipe
from pipeline.training.timing import flop_counter

ROWS = 17  # that are run through a network: a tensor whose length they divide holds rows, another one weights
NO_KERNEL = {"device", "detach", "alias", "_unsafe_view", "empty", "empty_like", "scalar_tensor", "lift_fresh"}
NEEDED = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")  # of what open_clip says of a model


@dataclass(frozen=True)
class Size:
    """The size of a model.

    Attributes:
        forward: Floating-point operations of one row's forward pass, as training sees it, two per multiply-add.
        parameters: Number of parameters.
        activations: Bytes of a row in bf16 that a forward pass keeps for the backward pass.
        recomputed: Bytes of a row in bf16 where each layer keeps its input alone, and is computed again.
        kernels: Kernels that a forward pass launches, of however many rows.
        layers: Number of layers that are compiled, sharded and computed again each for itself.
    """

    forward: float
    parameters: int
    activations: float
    recomputed: float
    kernels: int
    layers: int

    @property
    def training(self) -> float:
        """Returns the operations of one training sample, by the usual count of three forward passes."""
        return 3 * self.forward


@dataclass(frozen=True)
class ClipSize:
    """Operations to embed one image and one caption, the dimension of embeddings, and the side of images, pixels."""

    image: float
    text: float
    dim: int
    parameters: int
    side: int


def count_model(config: Config, stage: str) -> Size:
    """Returns the size of the model that a stage trains. Raises UserError for a CLIP that open_clip does not know."""
    if stage == "clip":
        clip = count_clip(config.clip)
        pretrained = Size(clip.image + clip.text, clip.parameters, 0.0, 0.0, 0, 1)
        return pretrained if config.clip.pretrained else _clip_size(config.clip.model)
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
    with FakeTensorMode():
        tokens, row = torch.zeros(ROWS, 77, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int64)
        embedding, kept = torch.zeros(ROWS, dim), torch.ones(ROWS, dtype=torch.bool)
        network: torch.nn.Module
        inputs: tuple[torch.Tensor, ...]
        match model:
            case ARPriorConfig():
                network = ARPrior(model, dim, codes, tower)
                inputs = (tokens, embedding, row, torch.zeros(ROWS, codes, dtype=torch.int64), kept)
            case DiffusionPriorConfig():
                network = DiffusionPrior(model, dim, tower)
                inputs = (embedding, row, tokens, embedding, kept)
            case DecoderConfig():
                network = Decoder(model, dim, tower)
                image = torch.zeros(ROWS, 3, model.image_size, model.image_size)
                inputs = (image, row, embedding, tokens, kept, kept)
            case UpsamplerConfig():
                network = Upsampler(model)
                crop, low = model.crop_size, model.crop_size // model.scale
                inputs = (torch.zeros(ROWS, 3, crop, crop), row, torch.zeros(ROWS, 3, low, low))
            case _:
                raise TypeError(f"no size known for {type(model).__name__}")
        return _counted(network, lambda: network(*inputs))


@lru_cache
def _clip_size(model: ClipConfig) -> Size:
    with FakeTensorMode():
        network = open_clip.CLIP(**model.model_config())
        images = torch.zeros(ROWS, 3, model.image_size, model.image_size)
        tokens = torch.zeros(ROWS, network.context_length, dtype=torch.int64)
        return _counted(network, lambda: (network.encode_image(images), network.encode_text(tokens)))


def _counted(network: nn.Module, forward: Callable[[], Any]) -> Size:
    """Returns the size of a network of which ``forward`` computes ROWS rows."""
    counter, kept = flop_counter(), ForwardPass(network)
    with counter, kept, saved_tensors_hooks(kept.keep, lambda tensor: tensor):
        forward()
    of_layers = [size for layer, size in kept.bytes.items() if layer is not None]
    outside = kept.bytes[None] + kept.inputs
    in_bf16 = 0.5 / ROWS  # of the bytes of all rows in fp32
    return Size(
        counter.get_total_flops() / ROWS,
        sum(p.numel() for p in network.parameters()),
        in_bf16 * (sum(kept.bytes.values()) + kept.inputs),
        in_bf16 * (outside + max(of_layers, default=0)),
        kept.kernels,
        max(1, len(list(layers(network)))),
    )


class ForwardPass(TorchDispatchMode):
    """Counts the kernels of a forward pass, and the bytes of rows that it keeps: by layer, and the layers' inputs."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.kernels, self.inputs = 0, 0
        self.bytes = Counter[int | None]()
        self.layer: int | None = None
        self.known = {parameter.untyped_storage() for parameter in network.parameters()}
        for number, layer in enumerate(layers(network)):
            layer.register_forward_pre_hook(partial(self._enter, number))
            layer.register_forward_hook(self._leave)

    def _enter(self, number: int, module: nn.Module, given: tuple[Any, ...]) -> None:
        self.layer = number
        self.inputs += sum(map(self._new, (x for x in tree_leaves(given) if isinstance(x, Tensor))))

    def _leave(self, *_: Any) -> None:
        self.layer = None

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts a tensor that is kept for the backward pass."""
        self.bytes[self.layer] += self._new(tensor)
        return tensor

    def _new(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage in self.known or tensor.numel() % ROWS:
            return 0
        self.known.add(storage)
        return storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in NO_KERNEL:
            self.kernels += 1
        return out


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
    return ClipSize(image.get_total_flops(), text.get_total_flops(), settings["embed_dim"], parameters, max(sides))


def _open_clip_config(clip: ClipConfig | str) -> dict[str, Any]:
    """Returns the configuration of a model of ours, of "open_clip:NAME:TAG", or of "local-dir:FOLDER"."""
    if isinstance(clip, ClipConfig):
        return clip.model_config()
    try:
        return config_of(clip)
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"clip.weights: {e}") from e
