"""One worker's view of all workers. The only place that asks how many there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel


def _silent(metrics: Mapping[str, Any]) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class World:
    """Worker ``rank`` of ``size`` on ``device``. ``report`` tells whoever watches how far this worker is."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[Mapping[str, Any]], None] = _silent

    @property
    def first(self) -> bool:
        """Whether this worker writes what needs writing once."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients that are the mean over workers after each backward pass."""
        return module if self.size == 1 else DistributedDataParallel(module)

    def gather_later(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within it a backward pass of a wrapped module leaves gradients with this worker, to be added up."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over workers, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """The rows of all workers, [n, ...], worker after worker, and where this worker's own begin.

        Their gradient is the sum of what all workers made of them. Workers may have unequal numbers of rows.
        """
        if self.size == 1:
            return rows, 0
        counts = torch.zeros(self.size, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        lengths = self.sum(counts).tolist()
        padding = rows.new_zeros(max(lengths) - len(rows), *rows.shape[1:])
        parts = all_gather(torch.cat([rows, padding]))
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]), sum(lengths[: self.rank])

    def wait(self) -> None:
        """Wait until all workers are here."""
        if self.size > 1:
            dist.barrier()

    def collect(self, items: list[str]) -> list[str]:
        """The items of all workers, worker after worker."""
        if self.size == 1:
            return items
        gathered: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]


def choose_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bf16 itself; emulation is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def computes_in(device: torch.device, precision: str) -> str:
    """What a device makes of a recipe's precision: "bf16" becomes "fp32" where there is no bf16."""
    return precision if has_bfloat16(device) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of every forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in(device, precision) == "bf16")
