"""Part 10: several GPUs of one machine, a process each: how fast they talk, and that they train as one does."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.gpu.bench import Bench, Outcome, Repeated, Skipped, make_rows, make_task, of_rows
from pipeline.settings import TrainingSettings
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.state import begin
from pipeline.training.train import fit

STEPS = 4
SAME = 1e-5  # of losses in fp32
SCALING = 0.9


def several(bench: Bench) -> Outcome:
    """Starts the processes and compares losses and rates of one, of all (DDP) and of a sharded model (FSDP2)."""
    if bench.gpus < 2:
        raise Skipped("--gpus N starts N processes")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (bench.gpus, bench.device.type, bench.preset, bench.quick, folder)
        mp.start_processes(worker, arguments, nprocs=bench.gpus, start_method="spawn")
        values = json.loads(Path(folder, "found.json").read_text())
    outcome = Outcome("", values)
    for kind in ("ddp", "fsdp"):
        apart = max(abs(a - b) / abs(b) for a, b in zip(values[f"{kind}_losses"], values["one_losses"], strict=True))
        outcome.expect(
            apart <= SAME, f"losses of {bench.gpus} workers ({kind}) and of one differ by {apart:.1e}, at most {SAME:g}"
        )
    scaling = values["scaling"]
    outcome.expect(
        not bench.cuda or scaling >= SCALING, f"{bench.gpus} GPUs train {scaling:.0%} as fast each as one alone"
    )
    outcome.line = (
        f"all-reduce {values['all_reduce'] / 1e9:.1f} GB/s, all-gather {values['all_gather'] / 1e9:.1f} GB/s, "
        f"scaling {scaling:.0%}"
    )
    return outcome


def worker(rank: int, size: int, kind: str, preset: str, quick: bool, folder: str) -> None:
    """Is one of the processes; rank 0 writes what was found."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    bench = Bench(device, "nano", quick)
    alone = _train(bench, ProcessGroup(device=device), 0, size, "fp32") if rank == 0 else []
    speed = Bench(device, preset, quick)
    own = _rate(speed, ProcessGroup(device=device))
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        found: dict[str, Any] = {"one_losses": alone}
        for name, sharded in (("ddp", False), ("fsdp", True)):
            group = ProcessGroup(rank, size, device, sharded=sharded)
            found[f"{name}_losses"] = _train(bench, group, rank, size, "fp32")
        found["scaling"] = _rate(speed, ProcessGroup(rank, size, device)) / own
        found |= _bandwidth(bench, size)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))


def _train(bench: Bench, group: ProcessGroup, rank: int, size: int, precision: Literal["bf16", "fp32"]) -> list[float]:
    """Returns the losses of a few steps of one batch, of which each worker of the group has its share."""
    recipe = of_rows(replace(bench.config.decoder, precision=precision), 2 * size, STEPS)
    task = make_task(bench.config, recipe)
    batch = make_rows(task, 2 * size, bench.config.clip.model.embed_dim)
    share = slice(rank * 2, rank * 2 + 2) if group.size > 1 else slice(None)
    feed: Any = Repeated(bench, task, {n: column[share] for n, column in batch.items()}, recipe, first=share.start or 0)
    state = begin(task, recipe, group)
    fit("gpu_check", feed, recipe, TrainingSettings(), group, state, lambda _: None)
    return [line["loss"] for line in state.journal.lines]


def _rate(bench: Bench, group: ProcessGroup) -> float:
    """Returns the rows a second of one worker."""
    rows = 2 if bench.quick else 16
    recipe = of_rows(bench.config.decoder, rows * group.size, 3 + STEPS)
    task = make_task(bench.config, recipe)
    feed: Any = Repeated(bench, task, make_rows(task, rows, bench.config.clip.model.embed_dim), recipe)
    marks: list[float] = []

    def between(_: object) -> None:
        bench.wait()
        marks.append(perf_counter())

    fit("gpu_check", feed, recipe, TrainingSettings(), group, begin(task, recipe, group), between)
    return STEPS * rows / (marks[-1] - marks[-1 - STEPS])


def _bandwidth(bench: Bench, size: int) -> dict[str, float]:
    """Returns bytes a second on the bus of an all-reduce and of an all-gather, as NCCL's tests count them."""
    count = 2**16 if bench.quick else 2**28
    part = torch.zeros(count // size, device=bench.device)
    whole = torch.zeros(count // size * size, device=bench.device)
    share = (size - 1) / size * whole.numel() * 4
    # A fixed number of calls: workers that measure for themselves would not call equally often.
    found = {}
    for name, call, times in (
        ("all_reduce", lambda: dist.all_reduce(whole), 2),
        ("all_gather", lambda: dist.all_gather_into_tensor(whole, part), 1),
    ):
        call()
        bench.wait()
        began = perf_counter()
        for _ in range(5):
            call()
        bench.wait()
        found[name] = times * share * 5 / (perf_counter() - began)
    return found
