"""Part 1, what the device is, and part 2, what it can do at best."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.gpu.bench import Bench, Outcome
from benchmarks.timing import cpu
from models.precision import has_bfloat16
from pipeline.cost.devices import DEVICES
from pipeline.graph.resources import cores

QUERIES = ("clocks.max.sm", "power.limit", "ecc.mode.current", "driver_version")  # of nvidia-smi
CONVOLUTIONS = ((320, 32, 16), (512, 64, 8), (1280, 8, 64))  # channels, side, rows


def device_name(bench: Bench) -> str:
    """Returns the name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(bench.device) if bench.cuda else cpu()


def sheet_peak(bench: Bench) -> float | None:
    """Returns the bf16 operations a second of the GPU's data sheet; None for another GPU and for a processor."""
    return next((device.peak for name, device in DEVICES.items() if bench.cuda and name in device_name(bench)), None)


def machine(bench: Bench) -> Outcome:
    """Says what is checked: device, versions, memory, cores."""
    values: dict[str, object] = {
        "device": device_name(bench),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": cores(),
        "bf16": has_bfloat16(bench.device),
    }
    if bench.cuda:
        free, total = torch.cuda.mem_get_info(bench.device)
        values |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "gpus": torch.cuda.device_count(),
        }
        values |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "memory": total, "free": free}
        values |= {
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "tf32_convolution": torch.backends.cudnn.allow_tf32,
        }
        if shutil.which("nvidia-smi"):
            asked = [
                "nvidia-smi",
                f"--query-gpu={','.join(QUERIES)}",
                "--format=csv,noheader",
                f"--id={bench.device.index or 0}",
            ]
            told = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.strip().split(", ")
            values |= dict(zip(QUERIES, told, strict=False))
    outcome = Outcome(", ".join(f"{name} {value}" for name, value in values.items()), values)
    if bench.cuda:
        outcome.expect(bool(values["bf16"]), "the GPU has no bf16: trainings compute in fp32")
        outcome.expect(free > 0.8 * total, "others hold more than a fifth of the GPU's memory: times will not repeat")
    return outcome


def peaks(bench: Bench) -> Outcome:
    """Measures the best rates: matrix products, convolutions, copies, and the time to launch a kernel."""
    bf16 = torch.bfloat16 if has_bfloat16(bench.device) else torch.float32
    sides = (256,) if bench.quick else (4096, 8192, 16384) if bench.cuda else (1024,)
    values: dict[str, float] = {}
    rates = {side: _product(bench, side, bf16) for side in sides}
    bench.matmul = values["bf16_matmul"] = max(rates.values())
    values |= {f"bf16_matmul_{side}": rate for side, rate in rates.items()}
    with bench.exact():
        values["fp32_matmul"] = _product(bench, sides[0], torch.float32)
    if bench.cuda:
        torch.backends.cuda.matmul.allow_tf32 = True
        values["tf32_matmul"] = _product(bench, sides[0], torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = False
    for channels, side, rows in ((32, 8, 2),) if bench.quick else CONVOLUTIONS:
        for name, layout in (("nchw", torch.contiguous_format), ("nhwc", torch.channels_last)):
            values[f"bf16_conv_{channels}_{side}_{name}"] = _convolution(bench, channels, side, rows, bf16, layout)
    values |= _copies(bench)
    small = torch.zeros(1, device=bench.device)
    values["launch_seconds"] = bench.seconds(lambda: [small.add_(1) for _ in range(1000)]) / 1000
    best = max(rate for name, rate in values.items() if "conv" in name)
    outcome = Outcome(
        f"bf16 {bench.matmul / 1e12:.3g} TFLOP/s in products and {best / 1e12:.3g} in convolutions, fp32 "
        f"{values['fp32_matmul'] / 1e12:.3g}, {values['device_copy'] / 1e9:.0f} GB/s, "
        f"{values['launch_seconds'] * 1e6:.1f} us a launch",
        dict(values),
    )
    if peak := sheet_peak(bench):
        outcome.expect(
            bench.matmul >= 0.5 * peak,
            f"matrix products reach {bench.matmul / peak:.0%} of the data sheet: 50% or more",
        )
    return outcome


def _product(bench: Bench, side: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    return 2 * side**3 / bench.seconds(lambda: a @ b)


def _convolution(
    bench: Bench, channels: int, side: int, rows: int, dtype: torch.dtype, layout: torch.memory_format
) -> float:
    """Returns the operations a second of a 3x3 convolution."""
    x = torch.randn(rows, channels, side, side, device=bench.device).to(dtype, memory_format=layout)
    weight = torch.randn(channels, channels, 3, 3, device=bench.device).to(dtype, memory_format=layout)
    return 2 * 9 * channels**2 * side**2 * rows / bench.seconds(lambda: F.conv2d(x, weight, padding=1))


def _copies(bench: Bench) -> dict[str, float]:
    """Returns bytes a second: read and written on the device, to it and from it, pinned and not."""
    size = 2**20 if bench.quick or not bench.cuda else 2**30
    there, here = torch.zeros(size, dtype=torch.uint8, device=bench.device), torch.zeros(size, dtype=torch.uint8)
    cases: dict[str, Callable[[], object]] = {
        "to_device": lambda: there.copy_(here),
        "from_device": lambda: here.copy_(there),
    }
    if bench.cuda:
        pinned = here.pin_memory()
        cases |= {"to_device_pinned": lambda: there.copy_(pinned), "from_device_pinned": lambda: pinned.copy_(there)}
    return {"device_copy": 2 * size / bench.seconds(there.clone)} | {
        name: size / bench.seconds(case) for name, case in cases.items()
    }
