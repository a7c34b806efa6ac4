"""A model that is spread over the workers (FSDP2): each holds some rows of every weight, average and moment.

A layer's weights are gathered for as long as it computes. So a model trains that no single device could hold, with the
arithmetic of one that every device holds whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """What is gathered, or computed again, at a time: the members of the outermost lists of modules."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from layers(child)


def spread(module: nn.Module, device: torch.device, workers: int, offload: bool) -> None:
    """Keep this worker's rows of every weight of ``module``, on ``device`` or, with ``offload``, on the CPU."""
    mesh = init_device_mesh(device.type, (workers,))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for part in (*layers(module), module):
        fully_shard(part, mesh=mesh, offload_policy=policy)


def recompute(model: nn.Module) -> None:
    """Keep of each layer its input alone for the backward pass, and compute the layer again there."""
    for layer in layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def gather_gradients(module: nn.Module, now: bool) -> None:
    """Whether the next backward passes of a spread module bring gradients together, or leave them to be added up."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)


def is_spread(tensor: Tensor) -> bool:
    """Whether other workers hold other rows of it."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This worker's rows of a spread tensor, which they share memory with; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """The place of this worker's first row among all."""
    if not isinstance(tensor, DTensor):
        return 0
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1][0]


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor; all workers have to ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
