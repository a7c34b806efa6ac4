"""Checks this machine: Python, cores, memory, GPU, disks."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.build import build
from pipeline.config import Config
from pipeline.doctor.finding import Finding, gigabytes
from pipeline.errors import UserError
from pipeline.graph.ray import this_machine
from pipeline.graph.resources import SHARED, STORE_SHARE, available_memory, cores, object_store_mb, team_of
from pipeline.settings import STATE_BYTES, RaySettings

PROCESS = 1 << 30  # bytes that Python, torch and Ray take in a process before any model
DEVICE_FILES = Path("/dev")
NVIDIA_SMI_S = 60.0  # of many GPUs whose driver has to wake up
LITTLE_DISK, NO_DISK = 10e9, 1e9


def check_machine() -> Iterator[Finding]:
    """Yields what there is to compute with."""
    import torch

    yield Finding("ok", "python", f"{platform.python_version()}, {sys.executable}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding("ok", "machine", f"{cores()} cores, {', '.join(gpus) or 'no GPU that torch can use'}")
    if (load := os.getloadavg()[0]) > 2 * cores():
        text = f"load of {load:.1f} on {cores()} cores: other programs take time that a run then measures as its own"
        yield Finding("warning", "machine", text, "end them, or wait, before a run or a probe")
    if not gpus and (there := installed_gpus()):
        advice = "install torch for CUDA"
        if torch.version.cuda:
            advice = f"install a driver that has CUDA {torch.version.cuda}, as nvidia-smi shows it"
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            advice = "unset CUDA_VISIBLE_DEVICES"
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
        said = f"torch {torch.__version__} for {build} sees none of this machine's GPUs ({there})"
        yield Finding("warning", "gpu", f"{said}: everything runs on CPU cores", advice)


def installed_gpus() -> str:
    """Returns the NVIDIA GPUs and their driver's version, as nvidia-smi or the kernel names them; "" without any."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True)
        found = Counter(line.strip().replace(", ", ", driver ") for line in done.stdout.splitlines() if line.strip())
    except (OSError, subprocess.SubprocessError):  # it is not there, or finds no driver
        found = Counter()
    if found:
        return ", ".join(f"{count} {what}" for what, count in found.items())
    return ", ".join(sorted(file.name for file in DEVICE_FILES.glob("nvidia[0-9]*")))


def check_memory(config: Config | None) -> Iterator[Finding]:
    """Yields free memory, of the GPU too, against what the processes and the largest training need at least."""
    import torch

    free = available_memory()
    if config is None:
        yield Finding("ok", "memory", f"{gigabytes(free)} free")
        return
    run = config.run
    settings = (getattr(run, name, None) for name, stage in build(config).items() if stage.kind == "data")
    here = this_machine(run.ray)
    workers = max((team_of(each, here).count for each in settings if each is not None), default=0)
    processes = PROCESS * (1 + workers) + (object_store_mb(run.ray, here) << 20)
    try:
        name, model = largest_training(config)
    except UserError:  # check_clips says so
        yield Finding("ok", "memory", f"{gigabytes(free)} free; all processes need {gigabytes(processes)}")
        return
    on_gpu = torch.cuda.is_available() and getattr(run, name).device != "cpu"
    need = f"{name}, the largest training, needs at least {gigabytes(model)}"
    yield _enough("memory", free, processes + (0 if on_gpu else model), f"{need}, all processes {gigabytes(processes)}")
    if on_gpu:
        yield _enough("gpu", torch.cuda.mem_get_info()[0], model, need)


def _enough(subject: str, free: int, needed: int, need: str) -> Finding:
    text = f"{gigabytes(free)} free; {need}"
    if free >= needed:
        return Finding("ok", subject, text)
    return Finding("warning", subject, text, "close other programs, or take a smaller preset")


def largest_training(config: Config) -> tuple[str, int]:
    """Returns the training with the most parameters, and the bytes of its state.

    Raises UserError for a CLIP that open_clip does not know.
    """
    from pipeline.cost.flops import count_model  # loads torch, without which doctor still checks the rest

    trained = (
        name for name, stage in build(config).items() if stage.kind == "training" and not stage.recipe.pretrained
    )
    bytes_of = {name: STATE_BYTES * count_model(config, name).parameters for name in trained}
    return max(bytes_of.items(), key=lambda item: item[1])


def check_disks(folders: Mapping[str, Path]) -> Iterator[Finding]:
    """Yields the free space where the folders are, or will be."""
    for name, folder in folders.items():
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        text = f"{gigabytes(free)} free for the {name} at {folder}"
        if free >= LITTLE_DISK:
            yield Finding("ok", "disk", text)
        else:
            advice = "free some or choose another folder; 1,000 pairs of 1024 px take about 0.5 GB, models come on top"
            yield Finding("problem" if free < NO_DISK else "warning", "disk", text, advice)


def check_shared_memory(settings: RaySettings) -> Iterator[Finding]:
    """Yields whether there is room for the object store of a Ray that is started here."""
    if not SHARED.exists() or os.environ.get("RAY_ADDRESS"):
        return
    free, here = shutil.disk_usage(SHARED).free, this_machine(settings)
    taken = wanted = object_store_mb(settings, here) << 20
    if here.gpus and settings.object_store_mb == "auto":
        wanted = max(taken, int(STORE_SHARE * available_memory()))
    text = f"{gigabytes(free)} free in {SHARED} for Ray's object store of {gigabytes(wanted)}"
    larger = "start the container with a larger --shm-size"
    if free >= wanted:
        yield Finding("ok", "shm", text)
    elif taken < wanted:
        yield Finding("warning", "shm", f"{text}, of which it takes {gigabytes(taken)}: GPUs may wait for rows", larger)
    else:
        advice = f"{larger}, or lower run.ray.object_store_mb"
        yield Finding("warning", "shm", f"{text}: Ray will spill to disk, which is slow", advice)
