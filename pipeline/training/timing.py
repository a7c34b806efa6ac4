"""Measures where a training's seconds go, and how much of the device's matrix rate the model uses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from models.precision import computes_in
from models.random_streams import RandomStreams
from pipeline.training.distributed.heartbeats import Pulse
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.feed.feed import Feed
from pipeline.training.state import TrainState
from pipeline.training.task import Batch, Task

PHASES = ("wait", "forward", "backward", "optimiser", "ema")  # of a step
SAMPLED = 15  # one step in 15 is timed on a device that works asynchronously
PEAK_SECONDS = 0.2


class StepTimer:
    """Adds the seconds of steps to ``seconds``, by phase, and tells ``pulse`` of every phase.

    On a CPU every step is timed. Other devices compute asynchronously and have to be waited for, so only one step of
    SAMPLED is timed there, and not the first, in which layers are compiled and memory is taken.
    """

    def __init__(self, seconds: dict[str, float], device: torch.device, pulse: Pulse | None = None):
        self.seconds, self.device, self.pulse = seconds, device, pulse or Pulse()
        self.last: float | None = None
        self.begun = False

    def start(self, step: int) -> None:
        """Begins a step."""
        timed = self.device.type == "cpu" or (self.begun and step % SAMPLED == 0)
        self.begun = True
        self.last = self._now() if timed else None
        self.pulse.mark("start")

    def __call__(self, phase: str) -> None:
        """Counts the time since the last call, or since the start, as this phase."""
        if self.last is not None:
            now = self._now()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
            self.pulse.add(phase, now - self.last)
            self.last = now
        self.pulse.mark(phase)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Speed:
    """Holds what a training's rate is compared with.

    Attributes:
        model_flops: Operations of a row's forward and backward pass, by the usual count of three forward passes; 0
            where no row was there to count them on.
        matmul_flops: Operations a second that matrix products reach on all workers together, in the training's
            precision.
    """

    model_flops: float
    matmul_flops: float

    def times(self, state: TrainState) -> dict[str, float]:
        """Returns rate, shares of the time, and utilisation, for a record."""
        rate = state.samples / max(state.seconds, 1e-9)
        times = {"samples_per_second": rate}
        times |= {f"share_{name}": share for name, share in shares_of(state.phase_seconds, state.seconds).items()}
        if self.model_flops:
            times |= {"model_flops_per_sample": self.model_flops, "matmul_flops_per_second": self.matmul_flops}
            times["utilisation"] = rate * self.model_flops / self.matmul_flops
        return times


NOT_MEASURED = Speed(0.0, 1.0)


def measure_speed(task: Task, state: TrainState, feed: Feed, precision: str, group: ProcessGroup) -> Speed:
    """Returns the Speed of a training, whose state does not change. Rank 0 calls it alone."""
    # A sharded model computes only with all workers: another one is counted in its place.
    model = task.model(0).eval() if group.sharded else state.ema
    flops, device = 0, next(model.parameters()).device
    for local in feed.validation(1, 1):
        batch = {name: column.to(device) for name, column in local.batch.items()}
        flops = forward_flops(task, model, batch, RandomStreams(local.streams, device))
    dtype = torch.bfloat16 if computes_in(group.device, precision) == "bf16" else torch.float32
    return Speed(3.0 * flops, group.size * matmul_peak(group.device, dtype, torch.get_num_threads()))


def shares_of(phase_seconds: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Returns the share of each phase in a training's ``seconds``; {} before the first step.

    "pause" are the validation passes and checkpoints between steps.
    """
    steps = sum(phase_seconds.get(phase, 0.0) for phase in PHASES)
    if not steps or not seconds:
        return {}
    pause = min(1.0, phase_seconds.get("pause", 0.0) / seconds)
    return {phase: phase_seconds.get(phase, 0.0) / steps * (1 - pause) for phase in PHASES} | {"pause": pause}


def forward_flops(task: Task, model: nn.Module, batch: Batch, rng: RandomStreams) -> int:
    """Returns the operations of the matrix products and convolutions of one forward pass, two per multiply-add.

    A model in evaluation mode does not change.
    """
    counter = flop_counter()
    with torch.no_grad(), counter:
        task.loss(model, batch, rng)
    return counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """Returns a context manager that counts operations as ``forward_flops`` does."""

    def on_cpu(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={cpu_attention: on_cpu})


@lru_cache
def matmul_peak(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Returns the operations a second of the fastest of some square matrix products, on a CPU with ``threads``."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < PEAK_SECONDS:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
