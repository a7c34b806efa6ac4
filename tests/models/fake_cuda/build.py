"""Models and batches on the fake device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import open_clip
import torch
from torch import Tensor

from models.clip import Clip
from models.codec import Codec
from models.decoder import Decoder
from models.prior_configs import ClipConfig, TextTower
from models.reverse import Progress
from pipeline.config import preset_config

CUDA = torch.device("cuda")
ROWS, DIM, CODES = 4, 64, 8
STREAMS = [(1, 2), (2, 2)]
Step = Callable[[], Any]
Sampling = Callable[[Progress], Tensor]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=CUDA)


def batch(side: int) -> dict[str, Tensor]:
    """A batch as the losses take it."""
    return {
        "image": zeros(ROWS, 3, side, side, dtype=torch.uint8),
        "tokens": zeros(ROWS, 77, dtype=torch.int64),
        "image_embedding": zeros(ROWS, DIM),
        "text_embedding": zeros(ROWS, DIM),
    }


def codec() -> Codec:
    shapes = [(DIM,), (CODES, DIM), (CODES,), (CODES, 1023), (CODES, 1024), (1023,)]
    tables: list[Any] = [zeros(*shape, dtype=torch.float64) for shape in shapes]
    return Codec(*tables, zeros(1024, dtype=torch.int64))  # type: ignore[call-arg]


def build(make: Callable[[], Any]) -> Any:
    """Returns the model, made on the device: fake weights cannot move there."""
    with CUDA:
        return make()


def config(preset: str, stage: str, **changes: Any) -> Any:
    return replace(getattr(preset_config(preset), stage).model, **changes)


def clip(config: ClipConfig) -> Clip:
    """A CLIP as ``Clip.build`` makes it, whose seed would be asked of the device."""
    sizes = config.model_config()
    model = open_clip.CLIP(**sizes)
    normal = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    open_clip.set_model_preprocess_cfg(model, normal)
    return Clip(model, sizes)


def decoder(preset: str = "nano", layers: int = 1, **changes: Any) -> Decoder:
    """Returns a decoder, which may read a frozen tower of so many layers."""
    chosen = config(preset, "decoder", **changes)
    return build(lambda: Decoder(chosen, DIM, TextTower(512, layers, 8)))


def prior(stage: str, kind: type, *sizes: int) -> Any:
    """Returns the prior of nano, which reads a frozen tower."""
    return build(lambda: kind(config("nano", stage), DIM, *sizes, TextTower(512, 1, 8)))
