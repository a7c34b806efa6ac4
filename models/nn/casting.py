"""Half precision on a GPU with fewer casts than autocast makes.

Autocast casts every weight of a layer by itself, and the input and output of every norm, which it computes in fp32.
More than a third of the kernels of a training step were such casts. Here a block computes in one precision from end to
end, and its weights are cast by one kernel. Norms lose nothing: their kernels accumulate in fp32 anyway.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def half_precision(x: Tensor) -> torch.dtype | None:
    """Returns the precision of autocast where ``x`` is on a GPU and autocast is on, else None."""
    return torch.get_autocast_dtype("cuda") if x.is_cuda and torch.is_autocast_enabled("cuda") else None


class _Together(torch.autograd.Function):
    """Casts tensors by one kernel, and their gradients back by another."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return tuple(_cast(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, *_cast(gradients, ctx.dtype)


def _cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    out = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(out, tensors)
    return out


def call_in(dtype: torch.dtype, module: nn.Module, *given: Tensor | None) -> Tensor:
    """Returns ``module(*given)`` with all its weights, which are of one dtype, cast to ``dtype`` by one kernel."""
    names, weights = zip(*module.named_parameters(), strict=True)
    return functional_call(module, dict(zip(names, _Together.apply(dtype, *weights), strict=True)), given)


def run(module: nn.Module, x: Tensor, *rest: Tensor | None) -> Tensor:
    """Returns ``module(x, *rest)``, on a GPU in the precision of ``x``; elsewhere autocast decides, where it is on."""
    if not x.is_cuda or next(module.parameters()).dtype == x.dtype:
        return module(x, *rest)
    return call_in(x.dtype, module, x, *rest)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off on the device of ``x``."""
    # torch.autocast refuses the meta device, on which networks are measured without memory.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
