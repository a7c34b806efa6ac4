"""Measures cases in turn, round after round, so that a machine's moods hit all of them alike."""

import argparse
import ctypes
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

PACKAGES = ("torch", "numpy", "diffusers", "bsrgan")

Seconds = dict[str, list[float]]
"""The seconds of every round, by case."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """Returns the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds after one that warms up (7)")
    parser.add_argument("--threads", type=int, default=0, help="threads to compute on (PyTorch's own choice)")
    parser.add_argument("--quick", action="store_true", help="sizes so small that the ratios mean nothing: for tests")
    return parser


def interleave(cases: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> Seconds:
    """Returns the seconds of each case in each of ``rounds`` rounds, after ``warmup`` rounds that do not count.

    A round runs every case once; each round starts with another one. Raises ValueError on no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: use 1 or more")
    seconds: Seconds = {name: [] for name in cases}
    names = list(cases)
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = perf_counter()
            cases[name]()
            elapsed = perf_counter() - start
            if number >= warmup:
                seconds[name].append(elapsed)
    return seconds


def ratio(seconds: Seconds, case: str, other: str) -> float:
    """Returns the median over rounds of one case's time divided by another's in the same round."""
    return median(a / b for a, b in zip(seconds[case], seconds[other], strict=True))


def show(seconds: Seconds, unit: float = 1e3, name: str = "ms") -> None:
    """Prints least, median and most of each case."""
    for case, values in seconds.items():
        low, mid, high = (value * unit for value in (min(values), median(values), max(values)))
        print(f"  {case:34} {mid:10.2f} {name}   ({low:.2f} to {high:.2f})")


def begin(title: str | None, options: argparse.Namespace) -> None:
    """Takes the number of threads from the options; prints what is measured, on what, and how busy it is."""
    if options.threads:
        torch.set_num_threads(options.threads)
    print((title or "").partition("\n")[0])
    packages = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    print(f"  Python {platform.python_version()}, {packages}")
    print(f"  {cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {load()}")


def finish(ratios: dict[str, float]) -> None:
    """Prints the load once more and then, as the last line, the ratios as one JSON object."""
    print(f"  {load()} at the end")
    print(json.dumps({name: float(f"{value:.4g}") for name, value in ratios.items()}))


def memory_of(step: Callable[[], object]) -> int:
    """Returns the bytes by which ``step`` raises this process's resident memory at its highest. Linux only.

    Everything that stays (weights, gradients, moments) should be there before, so that the rest is activations.
    """
    ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept for later would hide the same need again
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def peak_memory() -> int:
    """Returns the highest resident memory of this process since it began, bytes. Linux only."""
    return _status("VmHWM")


def load() -> str:
    """Returns the load averages of the machine, as text."""
    return "load " + " ".join(f"{value:.2f}" for value in os.getloadavg())


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def cpu() -> str:
    """Returns the name of the processor and the instructions that PyTorch uses on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str:
    """Returns the short name of the commit that is checked out; a "+" says that files differ from it."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return said.stdout.strip()
