"""One worker's view of all workers. The only place that asks how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import UserError
from pipeline.training.distributed.sharding import gather_gradients, spread, whole

T = TypeVar("T")


def _silent(metrics: Mapping[str, Any]) -> None:
    """Nobody listens."""


def _staying() -> bool:
    """Nobody takes anything away."""
    return False


@dataclass(frozen=True)
class World:
    """Worker ``rank`` of ``size`` on ``device``. ``report`` tells whoever watches how far this worker is; ``leaving``
    says whether the machine of one of them is to be taken away soon.

    ``sharded``: models are spread over the workers, their weights on the CPU with ``offload``; what is done with one
    is done by all together.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[Mapping[str, Any]], None] = _silent
    leaving: Callable[[], bool] = _staying
    sharded: bool = False
    offload: bool = False

    @property
    def first(self) -> bool:
        """Whether this worker writes what needs writing once."""
        return self.rank == 0

    def place(self, module: nn.Module) -> None:
        """Bring a new module to where it is used."""
        if self.sharded:
            spread(module, self.device, self.size, self.offload)
        else:
            module.to(self.device)

    def wrap(self, module: nn.Module) -> nn.Module:
        """A module in its place, with gradients that are the mean over workers after each backward pass."""
        return module if self.sharded or self.size == 1 else DistributedDataParallel(module)

    @contextmanager
    def gathering(self, module: nn.Module, now: bool) -> Iterator[None]:
        """Within it a backward pass of a wrapped module brings gradients together ``now``, or leaves them with this
        worker, to be added up."""
        gather_gradients(module, now)
        if isinstance(module, DistributedDataParallel) and not now:
            with module.no_sync():
                yield
        else:
            yield

    def whole(self, module: nn.Module) -> dict[str, Tensor]:
        """The weights of a module that is in its place, on the CPU of the first worker; {} on others."""
        gathered = {}
        for name, tensor in module.state_dict().items():
            full = whole(tensor.detach())
            if self.first:
                gathered[name] = full.cpu()
        return gathered

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

    def collect(self, items: list[T], group: Any = None) -> list[T]:
        """The items of all workers, worker after worker. ``group``: see ``aside``."""
        if self.size == 1:
            return items
        gathered: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(gathered, items, group)
        return [item for part in gathered for item in part]

    def aside(self) -> Any:
        """A group of all workers for what a thread of each does beside the steps."""
        return dist.new_group(backend="gloo") if self.size > 1 else None

    def agree(self, wish: bool) -> bool:
        """What the first worker wishes."""
        return self.collect([wish])[0]


def choose_device(name: str) -> torch.device:
    """Returns the device of a name: "auto" is the first GPU, or the CPU where torch can use none; else as torch writes
    it. Raises UserError for a name that torch does not know, and for a GPU that it cannot use."""
    there = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name}: unknown; use auto, cpu or cuda") from None
    if device.type == "cuda" and not there:
        raise UserError(
            f"device {name}: torch finds no GPU here; use auto or cpu, or install a driver and torch for CUDA"
        )
    return device


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
