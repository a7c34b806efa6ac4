"""One worker's view of the process group. The only module that asks how many workers there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

from pipeline.graph.resources import container_memory
from pipeline.settings import STATE_BYTES
from pipeline.training.distributed.heartbeats import Pulse
from pipeline.training.distributed.sharding import full_tensor, groups, shard_module, sync_gradients

T = TypeVar("T")
# GPUs wait no longer for each other before a training starts again. It is above what rank 0 does alone: it restores a
# checkpoint, validates and publishes.
HUNG_S = 300
# The same without GPUs, where that takes longer, and in a first step in which layers are compiled: one machine may have
# to compile what another has in its cache.
LONG_S = 1800
CHECK_EVERY = 16  # steps, at most, until workers report, and a loss that is NaN or Inf is noticed


def node_memory(device: torch.device, workers: int, offload: bool) -> int:
    """Returns the bytes of the GPUs of a node's ``workers``, or those of the node where weights lie there."""
    if device.type == "cuda" and not offload:
        return torch.cuda.get_device_properties(device).total_memory * workers
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(there, container_memory() or there)


@dataclass(frozen=True)
class ProcessGroup:
    """Worker ``rank`` of ``size``, which computes on ``device``.

    Attributes:
        rank: Counts from 0. Rank 0 writes what is written once.
        size: The number of workers.
        device: Device of this worker.
        node: Counts the machines of the workers from 0.
        report: Called with the progress of this worker.
        leaving: Returns whether the machine of one of the workers is to be taken away soon.
        report_steps: Returns after how many steps ``report`` is to be called again, at most.
        sharded: Models are sharded over the workers (FSDP). All workers then act on a model together.
        offload: Sharded weights lie in the memory of the CPU.
        pulse: Notes how far this worker is.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    node: int = 0
    report: Callable[[Mapping[str, Any]], None] = lambda metrics: None
    leaving: Callable[[], bool] = lambda: False
    report_steps: Callable[[], int] = lambda: CHECK_EVERY
    sharded: bool = False
    offload: bool = False
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def is_rank_0(self) -> bool:
        """Returns whether this worker writes what is written once."""
        return self.rank == 0

    def place(self, module: nn.Module, bf16: bool = False) -> None:
        """Moves a new module to where it is used: to the device, or sharded over the workers (see shard_module)."""
        if self.sharded:
            # Autocast computes norms in fp32 on a GPU; on the CPU they take no weights in bf16.
            halves = bf16 and self.device.type == "cuda"
            shard_module(module, self.device, self.size, self.offload, halves, self.copies(module))
        else:
            module.to(self.device)

    def copies(self, module: nn.Module) -> int:
        """Returns how often the workers hold a sharded module: once on each node, where half of its memory is enough.

        Nodes then send each other gradients and no weights. Where nodes hold unequal numbers of workers it is once.
        """
        nodes = self.collect([self.node])
        count = len(set(nodes))
        if count == 1 or self.size % count or nodes != [rank * count // self.size for rank in range(self.size)]:
            return 1
        needed = STATE_BYTES * sum(parameter.numel() for parameter in module.parameters())
        room = node_memory(self.device, self.size // count, self.offload)
        return count if all(self.collect([2 * needed <= room])) else 1

    def wrap(self, module: nn.Module) -> nn.Module:
        """Returns a placed module whose backward pass averages gradients over the workers."""
        if self.sharded or self.size == 1:
            return module
        # Gradients lie in the buckets that are sent. Buffers are the same everywhere: statistics take one worker.
        return DistributedDataParallel(module, gradient_as_bucket_view=True, forward_sync_buffers=False)

    @contextmanager
    def accumulation(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Lets a backward pass of a wrapped module accumulate its gradients on this worker.

        The ``last`` pass of a step averages them over the workers.
        """
        sync_gradients(module, last)
        if isinstance(module, DistributedDataParallel) and not last:
            with module.no_sync():
                yield
        else:
            yield

    def whole(self, module: nn.Module) -> dict[str, Tensor]:
        """Returns the weights of a placed module on the CPU of rank 0; {} on the others."""
        gathered = {}
        for name, tensor in module.state_dict().items():
            full = full_tensor(tensor.detach())
            if self.is_rank_0:
                gathered[name] = full.cpu()
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum over workers, which is made in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, lengths: Sequence[int], rows: Tensor) -> tuple[Tensor, int]:
        """Returns the rows of all workers, [n, ...], by rising rank, and the place of this worker's first row.

        Their gradient is the sum over all workers, of which each has its number of rows in ``lengths``.
        """
        if self.size == 1:
            return rows, 0
        padding = rows.new_zeros(max(lengths) - len(rows), *rows.shape[1:])
        parts = all_gather(torch.cat([rows, padding]))
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]), sum(lengths[: self.rank])

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Gives every worker the values of rank 0, in place."""
        for sending in [dist.broadcast(tensor, 0, async_op=True) for tensor in tensors]:
            sending.wait()

    def collect(self, items: list[T], group: Any = None) -> list[T]:
        """Returns the items of all workers, by rising rank. ``group``: see ``side_group``."""
        if self.size == 1:
            return items
        gathered: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(gathered, items, group)
        return [item for part in gathered for item in part]

    def wait_at_most(self, seconds: float, model: nn.Module) -> None:
        """Lets GPUs wait for each other for so long in all that begins from now on, after all that has begun.

        Without GPUs workers wait for LONG_S at all times.
        """
        if self.size == 1 or self.device.type != "cuda":
            return
        # This process runs ahead of its GPU: the others may yet be where the limit before holds.
        torch.cuda.synchronize(self.device)
        for group in filter(None, {dist.group.WORLD, *groups(model)}):
            group.set_timeout(timedelta(seconds=seconds))

    def side_group(self) -> Any:
        """Returns a process group of all workers for what a thread of each does beside the steps."""
        return dist.new_group(backend="gloo") if self.size > 1 else None
