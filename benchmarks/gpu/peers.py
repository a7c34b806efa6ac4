"""Part 6: ours and diffusers' U-Nets of the same weights, on the device, in the precision of trainings."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from benchmarks.gpu.bench import Bench, Outcome, Skipped, on
from models.precision import autocast
from models.random_streams import RandomStreams
from pipeline.errors import install

ROWS = 32
Found = tuple[float, int]  # seconds, and bytes at the highest


def peers(bench: Bench) -> Outcome:
    """Compares a training step's time and memory; on a CPU ``benchmarks.unet_step`` does so better."""
    if not bench.cuda:
        raise Skipped("python -m benchmarks.unet_step compares them on a CPU")
    if find_spec("diffusers") is None:
        raise Skipped(f"diffusers is not installed: {install('reference')}")
    from benchmarks.unet_step import KINDS, SIDES

    outcome = Outcome("")
    for kind in KINDS:
        found = {side: _measure(bench, kind, side) for side in SIDES}
        (seconds, size), (their_seconds, their_size) = (found[side] for side in SIDES)
        outcome.values |= {f"{kind}_time": seconds / their_seconds, f"{kind}_memory": size / their_size}
    for name, ratio in outcome.values.items():
        outcome.expect(ratio <= 1.0, f"{name}: ours over diffusers' {ratio:.2f}, at most 1.0")
    outcome.line = "ours over diffusers': " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in outcome.values.items())
    return outcome


def _measure(bench: Bench, kind: str, side: str) -> Found:
    from benchmarks.unet_step import Decoder, decoder_loss, examples, make, upsampler_loss

    model = make(kind, side, bench.quick).to(bench.device)
    batch, rng = on(bench.device, examples(model, ROWS)), RandomStreams([(0, ROWS)], bench.device)
    loss = decoder_loss if isinstance(model, Decoder) else upsampler_loss

    def step() -> None:
        with autocast(bench.device, "bf16"):
            total = loss(model, batch, rng).total.mean()  # type: ignore[arg-type]
        total.backward()
        model.zero_grad()

    seconds = bench.seconds(step, 3.0)
    bench.free()
    step()
    size = torch.cuda.max_memory_allocated(bench.device) - torch.cuda.memory_allocated(bench.device)
    return seconds, size
