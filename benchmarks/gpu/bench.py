"""What the parts of the check share: a device, models of a preset with made-up rows, and clocks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.images import WORDS
from benchmarks.tiny import sized_config
from models.clip import Clip
from models.codec import Codec
from models.frozen_text import FrozenTower
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.prior_configs import ARPriorConfig, DiffusionPriorConfig
from models.random_streams import RandomStreams, derive_seed
from models.tokens import tokenize
from pipeline.build import build
from pipeline.config import Config
from pipeline.training.feed.feed import LocalBatch, read_ahead, use_one_thread
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.task import Batch, Prepares, Task
from pipeline.training.tasks.ar_prior import ARPriorTask
from pipeline.training.tasks.clip import ClipTask
from pipeline.training.tasks.decoder import DecoderTask
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask
from pipeline.training.tasks.upsampler import UpsamplerTask


class Skipped(Exception):
    """Says why a part was not run."""


@dataclass
class Outcome:
    """What a part found: one line for people, values for programs, and what is not as it should be."""

    line: str
    values: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def expect(self, holds: bool, otherwise: str) -> None:
        """Adds a failure unless something holds."""
        if not holds:
            self.failures.append(otherwise)


@dataclass
class Bench:
    """What is checked, and what earlier parts found.

    Attributes:
        device: Where.
        preset: The models whose speed counts.
        quick: Whether sizes are so small that only crashes mean something.
        compile: Whether networks are also compiled.
        gpus: How many processes part 10 starts.
        matmul: Operations a second of the best matrix product in bf16 where the device has it; 0 until part 2.
        profile: What ``unclip plan --profile`` reads, by stage; found by part 5.
        png: The image of part 9.
    """

    device: torch.device
    preset: str
    quick: bool
    compile: bool = False
    gpus: int = 1
    matmul: float = 0.0
    profile: dict[str, Any] = field(default_factory=dict)
    png: bytes = b""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def config(self) -> Config:
        return sized_config(self.preset)

    def wait(self) -> None:
        """Waits until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], budget: float = 0.5) -> float:
        """Returns the least time of a call, device and all, of those that fit into ``budget`` seconds, after two."""
        times: list[float] = []
        spent = 0.0
        while spent < (0.0 if self.quick else budget) or len(times) < 5:
            start = perf_counter()
            call()
            self.wait()
            times.append(perf_counter() - start)
            spent += times[-1]
        return min(times[2:])

    def free(self) -> None:
        """Gives back what earlier models held."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Computes fp32 without TF32, in matrix products and in convolutions."""
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def trainings(config: Config) -> dict[str, TrainingRecipe]:
    """Returns the recipes of all trainings, by stage."""
    stages = build(config).values()
    return {s.name: s.recipe for s in stages if s.kind == "training" and not s.recipe.pretrained}


def make_task(config: Config, recipe: TrainingRecipe) -> Task:
    """Returns the task of a recipe, with a codec and a CLIP of random numbers where it takes them."""
    dim, model = config.clip.model.embed_dim, recipe.model  # type: ignore[attr-defined]
    tower = None
    if getattr(model, "text_encoder", None) == "frozen":
        clip = Clip.build(config.clip.model, 0)
        tower = FrozenTower.of(clip.model_config, clip.model.state_dict())
    match model:
        case ARPriorConfig():
            return ARPriorTask(model, dim, random_codec(dim, config.codec.components, model.buckets), tower)
        case DiffusionPriorConfig():
            return DiffusionPriorTask(model, dim, tower)
        case DecoderConfig():
            return DecoderTask(model, dim, tower)
        case UpsamplerConfig():
            return UpsamplerTask(model)
        case _:
            return ClipTask(model)


def random_codec(dim: int, codes: int, buckets: int) -> Codec:
    """Returns a codec with random directions and equally wide buckets."""
    codes = min(dim, codes)
    g = torch.Generator().manual_seed(1)
    components = torch.linalg.qr(torch.randn(dim, codes, generator=g, dtype=torch.float64))[0].T.contiguous()
    inner = torch.linspace(-0.1, 0.1, buckets - 1, dtype=torch.float64)
    values = torch.linspace(-0.1, 0.1, buckets, dtype=torch.float64)
    return Codec(
        mean=torch.zeros(dim, dtype=torch.float64),
        components=components,
        variance=torch.ones(codes, dtype=torch.float64),
        edges=inner.expand(codes, -1).contiguous(),
        values=values.expand(codes, -1).contiguous(),
        dot_edges=inner,
        dot_counts=torch.ones(buckets, dtype=torch.int64),
    )


def make_rows(task: Task, rows: int, dim: int) -> Batch:
    """Returns rows of noise in the columns that a task names."""
    g = np.random.default_rng(2)
    vectors = torch.from_numpy(g.standard_normal((2, rows, dim), dtype=np.float32))
    found = {
        "tokens": tokenize([" ".join(g.choice(WORDS, 10)) for _ in range(rows)]),
        "image_embedding": F.normalize(vectors[0], dim=1),
        "text_embedding": F.normalize(vectors[1], dim=1),
    }
    if "image" in task.columns:
        side = task.image_size
        found["image"] = torch.from_numpy(g.integers(0, 256, (rows, 3, side, side), dtype=np.uint8))
    return {name: found[name] for name in task.columns}


class Repeated:
    """A feed without data: the same rows at every step, from pinned memory, with draws that go on unless ``still``.

    Like the real one, it prepares rows. ``first`` is the place of its first row in the batch of all
    workers.
    """

    def __init__(
        self, bench: Bench, task: Task, batch: Batch, recipe: TrainingRecipe, still: bool = False, first: int = 0
    ):
        self.bench, self.recipe, self.still = bench, recipe, still
        self.places = range(first, first + len(next(iter(batch.values()))))
        self.batch = task.prepare(batch, RandomStreams(self._streams(0))) if isinstance(task, Prepares) else batch

    def _streams(self, step: int) -> list[tuple[int, int]]:
        return [(derive_seed("gpu_check", 0 if self.still else step, row), 1) for row in self.places]

    def batches(self, samples: int) -> Generator[LocalBatch, None, None]:
        """Yields the rows of every step, without end, after ``samples`` samples."""
        return read_ahead(self._batches(samples // self.recipe.batch))

    def _batches(self, step: int) -> Generator[LocalBatch, None, None]:
        use_one_thread()
        while True:
            local = LocalBatch(self.batch, [str(row) for row in self.places], self._streams(step))
            yield local.pinned() if self.bench.cuda else local
            step += 1


def of_rows(recipe: TrainingRecipe, rows: int, steps: int) -> TrainingRecipe:
    """Returns a recipe for ``steps`` steps of ``rows`` rows whose rate neither rises nor falls."""
    return replace(recipe, batch=rows, lanes=1, samples=rows * steps, warmup_steps=0, decay=0)


@torch.no_grad()
def fill_zeros(module: nn.Module) -> None:
    """Gives layers that start at zero small random weights, so that every layer's work shows in the output."""
    generator = torch.Generator().manual_seed(11)
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)


def on(device: torch.device, batch: Batch) -> Batch:
    """Returns a batch on a device."""
    return {name: column.to(device) for name, column in batch.items()}


def distance(found: Tensor, expected: Tensor) -> float:
    """Returns the norm of a difference over the norm of what is expected."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
