"""Part 4, what a step waits for, and part 5, how fast each stage trains: the loop of a training on rows in memory."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import open_clip
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench, Outcome, Repeated, Skipped, make_rows, make_task, of_rows, trainings
from benchmarks.gpu.machine import sheet_peak
from models.clip import Clip, config_named
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.precision import autocast, has_bfloat16
from models.prior_configs import ClipConfig
from models.tokens import tokenize
from pipeline.cost.flops import count_model
from pipeline.graph.device import OutOfMemory
from pipeline.graph.keys import flatten
from pipeline.settings import TrainingSettings
from pipeline.training.compiling import compile_layers
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.journal import MetricsJournal
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.state import TrainState, begin
from pipeline.training.timing import PHASES, matmul_peak
from pipeline.training.train import fit

QUIET = (
    512  # from this step on the journal has a line every eighth step, and every fifteenth is timed: 9 to 12 are neither
)
WARM, TIMED = 5, 20  # steps
OVERFIT, LEFT = 30, 0.9  # steps on one batch with one draw, and the most that they leave of the loss
MANY = 256  # rows, which never fit into the 64 MiB that are left for them
FULL = 0.85  # of the GPU's memory
WAITING = 0.03  # of a step's time may pass before its rows are there
IMAGES = 2500  # a second that CLIP ViT-B-32 embeds on an H100


class Trainer:
    """The loop of a training on rows in memory, with any number of rows and steps on one model."""

    def __init__(self, bench: Bench, recipe: TrainingRecipe):
        self.bench, self.recipe = bench, recipe
        self.task = make_task(bench.config, recipe)
        self.group = ProcessGroup(device=bench.device)
        self.state = begin(self.task, recipe, self.group)

    def run(self, rows: int, warm: int, steps: int, first: int = 0, still: bool = False, watch: Any = None) -> float:
        """Takes ``warm`` and then ``steps`` steps, and returns the seconds of the latter. Raises OutOfMemory."""
        state, recipe = self.state, of_rows(self.recipe, rows, first + warm + steps)
        state.samples, state.journal = first * rows, MetricsJournal()
        state.optimizer.zero_grad()
        batch = make_rows(self.task, rows, self.bench.config.clip.model.embed_dim)
        feed: Any = Repeated(self.bench, self.task, batch, recipe, still)
        marks: list[float] = []
        began = 0

        def between(state: TrainState) -> None:
            nonlocal began
            if began in (warm, warm + steps):
                self.bench.wait()
                marks.append(perf_counter())
                state.phase_seconds.clear() if began == warm else None
            if watch:
                watch(began)
            began += 1

        fit("gpu_check", feed, recipe, TrainingSettings(), self.group, state, between)
        return marks[-1] - marks[0]

    def most_rows(self) -> int:
        """Returns the largest power of two of rows that fits into memory, or the recipe's batch."""
        if not self.bench.cuda:
            return 2 if self.bench.quick else 8
        rows, room = 1, FULL * torch.cuda.mem_get_info(self.bench.device)[1]
        while True:
            try:
                self.run(rows, 1, 1)
            except OutOfMemory:
                self.bench.free()
                return max(1, rows // 2)
            if 2 * rows > self.recipe.batch or 2 * torch.cuda.max_memory_allocated(self.bench.device) > room:
                return rows
            rows *= 2


def waits(bench: Bench) -> Outcome:
    """Counts what makes the host wait for the GPU in steps after the first, by its place in the code."""
    if not bench.cuda:
        raise Skipped("a CPU makes nobody wait")
    outcome = Outcome("")
    for stage, recipe in trainings(bench.config).items():
        trainer = Trainer(bench, recipe)

        def watch(step: int) -> None:
            torch.cuda.set_sync_debug_mode("warn" if 9 <= step < 12 else "default")

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.run(2, 1, 15, QUIET, watch=watch)
        places = Counter(
            "/".join(Path(each.filename).parts[-2:]) + f":{each.lineno}"
            for each in caught
            if "called a synchronizing" in str(each.message)  # and not that the mode itself is a prototype
        )
        outcome.values[stage] = {place: count / 3 for place, count in places.items()}
        total = sum(places.values()) / 3
        outcome.expect(not total, f"{stage}: a step waits {total:.0f} times, at {', '.join(sorted(places)[:8])}")
        bench.free()
    outcome.line = ", ".join(f"{stage} {sum(found.values()):.0f}" for stage, found in outcome.values.items())
    return outcome


def speed(bench: Bench) -> Outcome:
    """Measures rate, share of the best rate, memory and kernels of each training, and the rate of embeddings."""
    outcome = Outcome("")
    bf16 = torch.bfloat16 if has_bfloat16(bench.device) else torch.float32
    best = bench.matmul or matmul_peak(bench.device, bf16, torch.get_num_threads())
    for stage, recipe in trainings(bench.config).items():
        trainer = Trainer(bench, recipe)
        rows = trainer.most_rows()
        warm, steps = (1, 2) if bench.quick else (WARM, TIMED)
        bench.free()
        values: dict[str, Any] = {"rows": rows, "seconds": trainer.run(rows, warm, steps, QUIET) / steps}
        values["rows_per_second"] = rows / values["seconds"]
        flops = count_model(bench.config, stage).training
        values["utilisation"] = values["rows_per_second"] * flops / best
        seconds = trainer.state.phase_seconds
        values |= {phase: seconds.get(phase, 0.0) / (sum(seconds.values()) or 1.0) for phase in PHASES}
        if bench.cuda:
            values["allocated"] = torch.cuda.max_memory_allocated(bench.device)
            values["reserved"] = torch.cuda.max_memory_reserved(bench.device)
            values["kernels"] = _kernels(trainer, rows)
            _lacks_memory(bench, trainer, outcome, stage)
        if peak := sheet_peak(bench):
            share = values["sheet_utilisation"] = values["rows_per_second"] * flops / peak
            least = _least(bench, recipe)
            outcome.expect(
                values["utilisation"] >= least,
                f"{stage}: reaches {values['utilisation']:.0%} of the best product ({share:.0%} of the data sheet), "
                f"{least:.0%} or more",
            )
            outcome.expect(values["wait"] <= WAITING, f"{stage}: waits {values['wait']:.0%} of its time for rows")
        trainer.recipe = replace(recipe, learning_rate=1e-3)
        steps, left = (6, 1.0) if bench.quick else (OVERFIT, LEFT)
        trainer.run(min(rows, 8), 0, steps, still=True)
        losses = [line["loss"] for line in trainer.state.journal.lines if "loss" in line]
        values["overfit"] = losses[-1] / losses[0]
        outcome.expect(
            values["overfit"] < left, f"{stage}: {steps} steps on one batch leave {values['overfit']:.0%} of the loss"
        )
        outcome.values[stage] = values
        bench.profile[stage] = {
            "recipe": flatten(recipe),
            "rows_per_second": values["rows_per_second"],
            "utilisation": values["utilisation"],
        }
        if bench.cuda and not bench.quick:
            values |= _faster(bench, trainer, rows)
        del trainer
        bench.free()
    _embeddings(bench, outcome)
    outcome.line = ", ".join(
        f"{stage} {found['rows_per_second']:.3g}/s ({found['utilisation']:.0%})"
        for stage, found in outcome.values.items()
        if "utilisation" in found
    )
    return outcome


def _least(bench: Bench, recipe: TrainingRecipe) -> float:
    """Returns the share of the best matrix product that a training has to reach: none is set for a CLIP."""
    match recipe.model:  # type: ignore[attr-defined]
        case ClipConfig():
            return 0.0
        case UpsamplerConfig():
            return 0.3
        case DecoderConfig():
            return 0.35 if bench.preset == "small" else 0.45
        case _:
            return 0.5


def _kernels(trainer: Trainer, rows: int) -> float:
    """Returns the kernels of a step."""
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        trainer.run(rows, 0, 2)
    return sum(event.count for event in run.key_averages()) / 2


def _lacks_memory(bench: Bench, trainer: Trainer, outcome: Outcome, stage: str) -> None:
    """Fills the GPU, so that a step has to say that it lacks memory."""
    bench.free()
    rest = torch.cuda.mem_get_info(bench.device)[0] - 2**26
    held = torch.empty(max(0, rest), dtype=torch.uint8, device=bench.device)
    try:
        trainer.run(MANY, 0, 1)
        outcome.expect(False, f"{stage}: a step of {MANY} rows fits into 64 MiB")
    except OutOfMemory:
        pass
    del held
    bench.free()


def _faster(bench: Bench, trainer: Trainer, rows: int) -> dict[str, float]:
    """Returns the rows a second in channels-last layout and, where it is asked for, of compiled networks."""
    state = trainer.state
    network = state.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state.optimizer.state.clear()  # moments of the other layout: a fused step wants those of the parameters
    found = {"channels_last_rows_per_second": rows * TIMED / trainer.run(rows, WARM, TIMED, QUIET)}
    if bench.compile:
        compile_layers(network)
        found["compiled_rows_per_second"] = rows * TIMED / trainer.run(rows, WARM, TIMED, QUIET)
    return found


def _embeddings(bench: Bench, outcome: Outcome) -> None:
    """Measures CLIP on images and captions that are decoded already: the preset's, and ViT-B-32."""
    rows = 8 if bench.quick else 256
    recipe = bench.config.clip
    cases = {"embeddings": Clip.build(recipe.model, 0)}
    if not bench.quick:
        cases["ViT-B-32"] = Clip(open_clip.create_model("ViT-B-32"), config_named("ViT-B-32"))
    for name, clip in cases.items():
        clip.eval().to(bench.device)
        images = torch.zeros(rows, 3, clip.image_size, clip.image_size, dtype=torch.uint8, device=bench.device)
        tokens = tokenize(["a red dog under an old tree"] * rows).to(bench.device)
        values: dict[str, float] = {}
        for precision in ("fp32", "bf16"):
            with torch.no_grad(), autocast(bench.device, precision):
                image = bench.seconds(partial(clip.encode_image, images))
                text = bench.seconds(partial(clip.encode_text, tokens))
            values |= {
                f"{precision}_images_per_second": rows / image,
                f"{precision}_pairs_per_second": rows / (image + text),
            }
        outcome.values[name] = values
        bench.free()
    if "ViT-B-32" in cases and sheet_peak(bench):
        rate = outcome.values["ViT-B-32"]["bf16_images_per_second"]
        outcome.expect(rate >= IMAGES, f"CLIP ViT-B-32 embeds {rate:,.0f} images/s, {IMAGES:,} or more")
