"""The machines of a plan: "64xH100", "650M", and what a GPU can do by its data sheet."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.errors import UserError

UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


@dataclass(frozen=True)
class Device:
    """A GPU: operations a second of dense products in bf16, and in fp32 without tensor cores; bytes of memory."""

    peak: float
    fp32: float
    memory: float


# NVIDIA's data sheets, SXM modules, without sparsity; of B200 a HGX board's figure over its eight GPUs.
DEVICES = {
    "A100": Device(312e12, 19.5e12, 80e9),
    "H100": Device(989e12, 67e12, 80e9),
    "H200": Device(989e12, 67e12, 141e9),
    "B200": Device(2250e12, 75e12, 180e9),
}


@dataclass(frozen=True)
class Fleet:
    """``count`` GPUs of one kind."""

    count: int
    name: str

    @property
    def device(self) -> Device:
        return DEVICES[self.name]


def parse_count(text: str) -> int:
    """650M, 1.5B, 10k or 7000 as a number of pairs. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMBG]?)", text.replace("_", "").replace(",", ""))
    count = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not found or count < 1:
        raise UserError(f"--pairs {text}: not a number of pairs; write it as 650M, 1.5B, 10k or 7000")
    return round(count)


def parse_fleet(text: str) -> Fleet:
    """64xH100 as 64 GPUs of that kind. Raises UserError."""
    found = re.fullmatch(r"(\d+)x(\w+)", text)
    if not found or int(found[1]) < 1:
        raise UserError(f"--gpus {text}: not a number of GPUs; write it as 64xH100")
    if found[2] not in DEVICES:
        raise UserError(f"--gpus {text}: unknown kind {found[2]}; known are {', '.join(DEVICES)}")
    return Fleet(int(found[1]), found[2])
