"""Compiles the layers of a network that is trained, where that pays."""

from __future__ import annotations

import logging
import os
import shutil

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.settings import COMPILE_PAYS_S, Compile
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.distributed.sharding import layers
from pipeline.training.timing import Speed

BACKEND = "inductor"
UTILISATION = 0.3  # of the rate of large matrix products that a network reaches before it is compiled
NEEDED = {"cuda": ("CC", "gcc"), "cpu": ("CXX", "g++")}  # the variable that names a compiler, and the usual one
log = logging.getLogger("unclip")


def compiles(stage: str, wanted: Compile, speed: Speed, samples: int, group: ProcessGroup) -> bool:
    """Returns whether to compile, the same on all workers, who call it together.

    Args:
        stage: Stage, named in messages.
        wanted: The setting.
        speed: Speed of the training; that of rank 0 counts.
        samples: Samples that are left to train on.
        group: This worker's view of the others.

    Raises:
        UserError: The setting is true, and a worker's machine has no C compiler.
    """
    if not wanted:
        return False
    seconds = samples * speed.model_flops / (UTILISATION * speed.matmul_flops)
    variable, usual = NEEDED[group.device.type]
    found = group.collect([(seconds, shutil.which(os.environ.get(variable, usual)) is not None)])
    if wanted == "auto" and (group.device.type != "cuda" or found[0][0] < COMPILE_PAYS_S):
        return False
    if not all(able for _, able in found):
        lacking = f"{usual}, which torch.compile needs, is not on every machine of this training"
        if wanted != "auto":
            raise UserError(f"run.{stage}.compile: {lacking}; install it, or set it to false")
        log.warning("%s: trains without compiling: %s", stage, lacking)
        return False
    # What nobody asked for must not end a training: torch warns and computes such a layer as it is.
    # PyTorch's guides name this switch, and the one below, by their modules: there are no others.
    torch._dynamo.config.suppress_errors = wanted == "auto"
    log.info("%s: compiling layers before the first step, which takes minutes", stage)
    return True


def compile_layers(model: nn.Module) -> None:
    """Lets each layer be compiled at its first call, for the shapes that it is called with.

    What surrounds a layer stays as it is: its names, and the hooks by which FSDP and DDP send its weights and gradients
    while other layers compute.
    """
    torch._dynamo.config.optimize_ddp = False  # which would cut layers at the ends of DDP's buckets
    for layer in layers(model):
        layer.forward = torch.compile(layer.forward, backend=BACKEND, dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]
