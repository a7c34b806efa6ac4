"""What a step of a training takes of a GPU's memory, alone or sharded over ranks that are not there.

Counted are the bytes of all live tensors on the device: no workspaces, buffers of NCCL or slack of the allocator.
"""

import gc
import weakref
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import device_mesh
from torch.distributed.fsdp._fully_shard import (
    _fsdp_collectives,
    _fsdp_init,
    _fsdp_param,
    _fsdp_param_group,
    _fsdp_state,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.ar_prior import ARPrior, ar_prior_loss
from models.clip_loss import clip_loss
from models.decoder import Decoder, decoder_loss
from models.diffusion.schedules import make_schedule
from models.diffusion_prior import DiffusionPrior, diffusion_prior_loss
from models.image_configs import UpsamplerConfig
from models.precision import autocast
from models.prior_configs import TextTower
from models.random_streams import RandomStreams
from models.upsampler import Upsampler, upsampler_loss
from pipeline.config import preset_config
from pipeline.cost.flops import text_tower
from pipeline.training.distributed import sharding
from pipeline.training.optimizer import make_optimizer
from tests.models.fake_cuda.build import CUDA, batch, build, clip, codec, zeros
from tests.models.fake_cuda.watch import pretend

DIM, CODES = 1024, 319


class Memory(TorchDispatchMode):
    """Follows the bytes of live storages on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: Any = weakref.WeakKeyDictionary()

    def add(self, storage: Any, size: int) -> None:
        """Counts a storage that is new, or has another size."""
        if storage not in self.sizes:
            held = self.sizes[storage] = [0]
            weakref.finalize(storage, self.drop, held)
        held = self.sizes[storage]
        self.live += size - held[0]
        held[0] = size
        self.peak = max(self.peak, self.live)

    def drop(self, held: list[int]) -> None:
        """Forgets a storage that is gone."""
        self.live -= held[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_local_scalar_dense":
            return 1
        out = func(*args, **(kwargs or {}))
        for found in tree_leaves(out):
            if isinstance(found, Tensor) and found.device.type == "cuda":
                storage = sharding.local(found).untyped_storage()
                if storage not in self.sizes:
                    self.add(storage, storage.nbytes())
        return out


class Stream(torch.cpu.Stream):
    """A stream, or an event of one, that nothing waits for."""

    def __init__(self, *_: Any, **__: Any): ...

    def record_event(self, event: Any = None) -> Any:
        return Stream()

    def record(self, stream: Any = None) -> Any:
        return self

    def wait(self, stream: Any = None) -> None: ...


def pretend_ranks(ranks: int, memory: Memory) -> None:
    """Makes a process group with this number of ranks, and lets FSDP believe in streams."""
    handle, stream = ModuleType("handle"), Stream()
    handle.__dict__.update({name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")})
    handle.__dict__.update(current_device=lambda: 0, current_stream=lambda *_: stream, Stream=Stream, Event=Stream)
    for module in (device_mesh, _fsdp_collectives, _fsdp_init, _fsdp_param_group, _fsdp_state):
        module._get_device_handle = lambda *_: handle  # type: ignore[attr-defined]
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = device_mesh.init_device_mesh("cuda", (ranks,))
    sharding.init_device_mesh = lambda *_, **__: mesh
    for name in ("alloc_storage", "free_storage"):
        original = getattr(_fsdp_param, name)

        def resized(tensor: Tensor, original: Any = original) -> None:
            original(tensor)
            memory.add(tensor.untyped_storage(), tensor.untyped_storage().nbytes())

        setattr(_fsdp_param, name, resized)


def make(stage: str, preset: str, tower: TextTower | None, at_once: int) -> tuple[Any, Any]:
    """Returns a model on the device and its loss."""
    recipe = getattr(preset_config(preset), stage)
    sizes = recipe.model
    if stage == "clip":

        def gather(own: Tensor) -> tuple[Tensor, int]:
            return own.repeat(recipe.batch // len(own), 1), 0

        loss = partial(clip_loss, gather=gather, crop=sizes.least_crop, at_once=at_once)
        return build(lambda: clip(sizes)), loss
    if stage == "decoder":
        return build(lambda: Decoder(sizes, DIM, tower)), decoder_loss
    if stage == "diffusion_prior":
        return build(lambda: DiffusionPrior(sizes, DIM, tower)), diffusion_prior_loss
    if stage == "ar_prior":
        return build(lambda: ARPrior(sizes, DIM, CODES, tower)), lambda m, b, d: ar_prior_loss(
            m, b, d, codec(CODES, DIM)
        )
    return build(lambda: Upsampler(sizes)), upsampler_loss


def columns_of(sizes: Any) -> dict[str, Tensor]:
    """Returns a row of what a feed makes for a model of these sizes."""
    columns = {name: column[:1] for name, column in batch(getattr(sizes, "image_size", 1)).items()}
    columns |= {name: zeros(1, DIM) for name in ("image_embedding", "text_embedding")}
    if isinstance(sizes, UpsamplerConfig):
        low = sizes.crop_size // sizes.scale
        columns["crop"] = zeros(1, 3, sizes.crop_size, sizes.crop_size, dtype=torch.uint8)
        columns["low"] = zeros(1, 3, low, low)
    return columns


def run(names: list[str]) -> dict[str, float]:
    """Returns GiB at rest and at the peak of a second step, of PRESET, STAGE, RANKS and ROWS.

    Perhaps of "recompute", too, or of the rows that CLIP encodes at once.
    """
    preset, stage, ranks, rows, *how = names
    at_once = int(how[0]) if how and how[0].isdigit() else 0
    config = preset_config(preset)
    tower = text_tower(getattr(config, stage).model, config.clip)
    pretend()
    memory, mode = Memory(), FakeTensorMode(allow_non_fake_inputs=True)
    make_schedule("cosine", 1000)
    if int(ranks) > 1:
        pretend_ranks(int(ranks), memory)
    with mode, torch.autograd.set_multithreading_enabled(False), memory:
        model, loss = make(stage, preset, tower, at_once)
        if how == ["recompute"]:
            sharding.recompute(model)
        if int(ranks) > 1:
            sharding.shard_module(model, CUDA, int(ranks), offload=False, bf16=True)
        average = [torch.empty_like(sharding.local(parameter)) for parameter in model.parameters()]
        optimizer = make_optimizer(model, getattr(preset_config(preset), stage))
        one = columns_of(getattr(config, stage).model)
        columns = {name: column.expand(int(rows), *column.shape[1:]) for name, column in one.items()}
        for _ in range(2):
            gc.collect()
            memory.peak = memory.live
            with autocast(CUDA, "bf16"):
                total = loss(model.train(), columns, RandomStreams([(1, int(rows))], CUDA)).total
            total.sum().backward()
            del total
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        found = {"rest": memory.live / 2**30, "peak": memory.peak / 2**30}
        del average
    return found
