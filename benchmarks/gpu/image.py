"""Part 9: a caption becomes an image of 1024 px, by a bundle of random weights."""

from __future__ import annotations

import io
from time import perf_counter

import torch
from PIL import Image

from benchmarks.gpu.bench import Bench, Outcome
from benchmarks.tiny import generator
from models.cascade import Generation, UnCLIP

SECONDS = {"karlo": 5.0}  # from a caption to 1024 px, at most


def image(bench: Bench) -> Outcome:
    """Measures the seconds of each model, in fp32 and in bf16, and draws twice to compare."""
    unclip = generator(bench.preset)
    for part in vars(unclip).values():
        if isinstance(part, torch.nn.Module):
            part.to(bench.device)
    size = 64 if bench.quick else 1024
    values: dict[str, object] = {}
    outcome = Outcome("", values)
    for precision in ("fp32", "bf16"):
        drawn = [_draw(bench, unclip, size, precision) for _ in range(2)]
        (first, _), (again, seconds) = drawn
        values[precision] = seconds
        outcome.expect(torch.equal(first.image, again.image), f"two images of one seed differ in {precision}")
        outcome.expect(bool(first.embedding.isfinite().all()), f"the embedding is not finite in {precision}")
    if bench.cuda:
        values["allocated"] = torch.cuda.max_memory_allocated(bench.device)
        most = SECONDS.get(bench.preset)
        outcome.expect(most is None or seconds["all"] <= most, f"an image takes {seconds['all']:.1f} s, at most {most}")
    out = io.BytesIO()
    Image.fromarray(first.image[0].numpy()).save(out, "PNG")
    bench.png = out.getvalue()
    outcome.line = f"{size} px in {values['fp32']['all']:.2f} s in fp32 and {seconds['all']:.2f} s in bf16"  # type: ignore[index]
    return outcome


def _draw(bench: Bench, unclip: UnCLIP, size: int, precision: str) -> tuple[Generation, dict[str, float]]:
    """Returns an image, and the seconds of each model and of all."""
    seconds: dict[str, float] = {}
    start = last = perf_counter()

    def progress(stage: str, step: int, steps: int, *_: object) -> None:
        nonlocal last
        if step == steps:
            bench.wait()
            seconds[stage], last = perf_counter() - last, perf_counter()

    made = unclip.generate(["a red dog under an old tree"], [0], progress, size=size, precision=precision)
    return made, seconds | {"all": perf_counter() - start}
