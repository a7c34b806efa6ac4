"""What is seen of a model that runs on the fake device."""

import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.cuda.amp.common
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[3]
NO_KERNEL = {"device", "detach", "alias", "_unsafe_view", "empty", "empty_like", "new_empty", "scalar_tensor"}
LIBRARY = torch.library.Library("aten", "IMPL")


class Watch(TorchDispatchMode):
    """Counts kernels, blocking copies between devices, and values that Python asks the device for, by place.

    A question is answered by 1 or True.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Begins again."""
        self.kernels, self.copies, self.asked = 0, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, given = func.overloadpacket.__name__, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name == "_local_scalar_dense":
            if given[0].is_cuda:
                self.asked[place()] += 1
            return {torch.bool: True}.get(given[0].dtype, 1)
        out = func(*args, **kwargs)
        devices = {t.device.type for t in (*given, *tree_leaves(out)) if isinstance(t, Tensor)}
        if len(devices) == 2 and name in ("_to_copy", "copy_"):
            if not kwargs.get("non_blocking"):
                self.copies[place()] += 1
        elif "cuda" in devices and not func.is_view and name not in NO_KERNEL:
            self.kernels += 1
        return out


def place() -> str:
    """Returns the file and line of the models or the pipeline that is running."""
    files = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_stack()]
    ours = [(file.relative_to(ROOT), line) for file, line in files if file.is_relative_to(ROOT)]
    ours = [(file, line) for file, line in ours if file.parts[0] in ("models", "pipeline")]
    return f"{ours[-1][0]}:{ours[-1][1]}" if ours else "?"


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """Calls one of CUDA's kernels of attention: the choice among them is not compiled here."""
    if torch.is_autocast_enabled("cuda"):
        queries, keys, values = (x.to(torch.get_autocast_dtype("cuda")) for x in (queries, keys, values))
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(queries, keys, values, dropout_p, is_causal)[0]
    bias = attn_mask.to(queries.dtype).expand(*queries.shape[:3], keys.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(queries, keys, values, bias, True, dropout_p, is_causal)[0]


def pretend() -> None:
    """Makes torch believe in the device, where it asks its own build and not the library."""
    torch.set_num_threads(1)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.nn.functional.scaled_dot_product_attention = attend
    Tensor.pin_memory = lambda self, *_: self
    torch.cuda.Event = lambda **_: SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    # Without a kernel of its own for a device, torch takes it to pieces.
    LIBRARY.impl("silu_backward", lambda gradient, _: torch.empty_like(gradient), "CUDA")
