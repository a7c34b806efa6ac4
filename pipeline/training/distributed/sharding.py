"""Shards a model over the workers (FSDP2): each holds some rows of every weight, average and moment.

A layer's weights are gathered for as long as it computes, so a model trains that no single device could hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the units of FSDP, checkpointing and compiling: the members of the outermost ModuleLists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from layers(child)


def shard_module(
    module: nn.Module, device: torch.device, workers: int, offload: bool, bf16: bool, copies: int = 1
) -> None:
    """Keeps this worker's rows of every weight of ``module``, on ``device`` or, with ``offload``, on the CPU.

    With several ``copies`` as many groups of workers, by rank, each hold all of it: within one weights are gathered,
    and between them only gradients are added up.

    With ``bf16`` the weights of layers are gathered in bf16, which is half of the traffic and of the memory; workers
    keep their rows and add up gradients in fp32. Inputs stay as they are, because autocast decides what computes in
    bf16, and so do weights outside of layers, some of which compute in fp32 under autocast, too.
    """
    shape, names = ((copies, workers // copies), ("replicate", "shard")) if copies > 1 else ((workers,), ("shard",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else whole
    # Layers first: FSDP gathers with a module what none inside it has taken, here the weights outside of layers.
    for part, policy in (*((layer, half) for layer in layers(module)), (module, whole)):
        fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=place)


@torch.no_grad()
def fill(module: nn.Module, whole: nn.Module | None, device: torch.device, offload: bool) -> None:
    """Gives a sharded module of the meta device memory, and the values of ``whole``, the same module on rank 0.

    They come tensor by tensor, and each worker keeps its rows. Elsewhere ``whole`` is None.
    """
    module.to_empty(device="cpu" if offload else device)
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):  # which are not offloaded
            setattr(part, name, buffer.to(device))
    values = None if whole is None else dict(_tensors(whole))
    for name, tensor in _tensors(module):
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if values is not None:
            full.copy_(values[name])
        dist.broadcast(full, 0)
        own, first = local(tensor), first_row(tensor)
        own.copy_(full[first : first + len(own)] if is_sharded(tensor) else full)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def recompute(model: nn.Module) -> None:
    """Keeps only the input of each layer for the backward pass, which computes the layer again."""
    for layer in layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def sync_gradients(module: nn.Module, now: bool) -> None:
    """Sets whether the next backward passes of a sharded module share gradients between its copies, or add them up.

    Each pass reduces them over the workers of a copy: gradients of the whole model would fill every GPU otherwise.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(now)


def groups(module: nn.Module) -> list[dist.ProcessGroup]:
    """Returns the process groups over which a module is sharded; [] where it is not."""
    tensor = next(module.parameters())
    return tensor.device_mesh.get_all_groups() if isinstance(tensor, DTensor) else []


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether other workers hold other rows of it."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns this worker's rows of a sharded tensor, which share its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_saved(tensor: Tensor) -> bool:
    """Returns whether a sharded tensor is of the first copy of its model, which checkpoints hold."""
    mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
    return mesh is not None and (mesh.ndim == 1 or mesh.get_local_rank(0) == 0)


def first_row(tensor: Tensor) -> int:
    """Returns the place of this worker's first row among all rows."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh = tensor.device_mesh
    return rows_of(mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1), len(tensor)).start


def rows_of(worker: int, workers: int, rows: int) -> range:
    """Returns the rows that a worker keeps of a sharded tensor with ``rows`` rows, as torch.chunk cuts it."""
    each = -(-rows // workers)
    return range(min(worker * each, rows), min((worker + 1) * each, rows))


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns all rows of a tensor; all workers have to call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
