"""GPUs that a plan knows: what one of them can do, and a number of them by the name that people write."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from pipeline.errors import UserError


@dataclass(frozen=True)
class Device:
    """A GPU: operations a second of dense products in bf16, and in fp32 without tensor cores; bytes of memory."""

    peak: float
    fp32: float
    memory: float


# NVIDIA's data sheets and white papers, without sparsity: of A100 to H200 the SXM modules, of B200 a HGX board's figure
# over its eight GPUs, of GeForce bf16 with sums in fp32, at which they are half as fast.
DEVICES = {
    "A100": Device(312e12, 19.5e12, 80e9),
    "H100": Device(989e12, 67e12, 80e9),
    "H200": Device(989e12, 67e12, 141e9),
    "B200": Device(2250e12, 75e12, 180e9),
    "L4": Device(121e12, 30.3e12, 24e9),
    "L40S": Device(362e12, 91.6e12, 48e9),
    "RTX 3060": Device(25.5e12, 12.7e12, 12e9),
    "RTX 3090": Device(71e12, 35.6e12, 24e9),
    "RTX 4090": Device(165e12, 82.6e12, 24e9),
    "RTX 5090": Device(209e12, 104.8e12, 32e9),
}
UNKNOWN = DEVICES["L4"]  # stands for any other GPU
APPLE = re.compile(r"(APPLE|MPS|MAC|M[1-9]\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Fleet:
    """A number of GPUs of one kind."""

    count: int
    name: str


def parse_fleet(text: str) -> Fleet:
    """Reads 64xH100, 1xRTX4090 or "1x RTX 4090" as that many GPUs of that kind. Raises UserError."""
    found = re.fullmatch(r"(\d+)\s*x\s*(\S.*)", text)
    name = found[2] if found else text.strip()
    if APPLE.match(name):
        raise UserError(f"--gpus {text}: Apple's GPUs are not used; leave it out to plan for this machine's cores")
    kind = next((known for known in DEVICES if _plain_kind(known) == _plain_kind(name)), None)
    if not found:
        example = shlex.quote(f"1x{name}" if kind else "64xH100")
        raise UserError(f"--gpus {text}: not a number of GPUs; write it as {example}")
    if int(found[1]) < 1:
        raise UserError(f"--gpus {text}: name at least 1 GPU, or leave it out to plan for this machine")
    if kind is None:
        raise UserError(f"--gpus {text}: unknown kind {name}; name the most similar of {', '.join(DEVICES)}")
    return Fleet(int(found[1]), kind)


def _plain_kind(name: str) -> str:
    """Returns 4090 for "RTX 4090", "rtx-4090" and "GeForce RTX 4090"; H100 for "NVIDIA H100"."""
    return re.sub(r"NVIDIA|GEFORCE|RTX|\W|_", "", name.upper())
