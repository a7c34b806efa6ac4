"""Part 7, how fast a feed reads, and part 8, how fast a checkpoint goes to a folder and comes back."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import closing
from time import perf_counter, thread_time

from benchmarks.gpu.bench import Bench, Outcome, make_task, of_rows, trainings
from benchmarks.gpu.steps import Trainer
from benchmarks.images import publish
from pipeline.store import open_store
from pipeline.training.checkpoints import Checkpoints, snapshot
from pipeline.training.feed.feed import Feed, LocalBatch
from pipeline.training.recipes import DecoderRecipe, UpsamplerRecipe

SHARDS = 4


def feed(bench: Bench) -> Outcome:
    """Measures rows a second of the feeds of image models, from JPEGs in a folder, and the cores that they take."""
    outcome = Outcome("")
    kinds = DecoderRecipe | UpsamplerRecipe
    wanted = {stage: recipe for stage, recipe in trainings(bench.config).items() if isinstance(recipe, kinds)}
    for stage, recipe in wanted.items():
        task = make_task(bench.config, recipe)
        side = max(256, task.image_size)
        shards, rows, batch = (1, 12, 4) if bench.quick else (SHARDS, 500 if side == 256 else 100, 32)
        with tempfile.TemporaryDirectory() as folder:
            store = open_store(folder)
            inputs = publish(store, shards, rows, (side, 2 * side) if side == 256 else (side, side))
            source = Feed(store, inputs, task, of_rows(recipe, batch, 1), cache_mb=0, pin=bench.cuda)
            steps = max(1, shards * rows // batch - 2)
            with closing(source.batches(0)) as batches:
                next(batches)
                began, own = perf_counter(), 0.0
                for _ in range(steps):
                    own += _host_seconds(bench, batches)
                seconds = perf_counter() - began
        rate = steps * batch / seconds
        outcome.values[stage] = {"side": side, "rows_per_second": rate, "host_seconds_per_row": own / (steps * batch)}
        if bench.cuda and stage in bench.profile:
            need = bench.profile[stage]["rows_per_second"]
            outcome.expect(
                rate >= need, f"{stage}: the feed makes {rate:.0f} rows/s, the GPU trains on {need:.0f}: add cores"
            )
    outcome.line = ", ".join(
        f"{stage} {found['rows_per_second']:.0f} rows/s, {1e3 * found['host_seconds_per_row']:.2g} ms of the host each"
        for stage, found in outcome.values.items()
    )
    return outcome


def _host_seconds(bench: Bench, batches: Generator[LocalBatch, None, None]) -> float:
    """Returns the processor time of this thread for a batch on its way to the device."""
    began = thread_time()
    for column in next(batches).batch.values():
        column.to(bench.device, non_blocking=True)
    return thread_time() - began


def checkpoint(bench: Bench) -> Outcome:
    """Saves and restores the decoder, and takes the next step with both."""
    recipe = bench.config.decoder
    trainer = Trainer(bench, recipe)
    rows = 2 if bench.quick else 8
    trainer.run(rows, 0, 2)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(open_store(folder), "gpu_check", 1)
        began = perf_counter()
        checkpoints.publish(snapshot(trainer.state))
        saved = perf_counter()
        other = Trainer(bench, recipe)
        fresh = perf_counter()
        found = checkpoints.restore(other.state, trainer.state.samples)
        bench.wait()
        restored = perf_counter()
    losses = []
    for each in (trainer, other):
        each.run(rows, 0, 1, first=2)
        losses.append(each.state.journal.lines[-1]["loss"])
    size = 16 * sum(p.numel() for p in trainer.state.model.parameters() if p.requires_grad)
    times = {"save": saved - began, "restore": restored - fresh}
    outcome = Outcome(
        f"{size / 1e9:.3g} GB: saved in {times['save']:.2f} s ({size / 1e9 / times['save']:.2f} GB/s), restored in "
        f"{times['restore']:.2f} s ({size / 1e9 / times['restore']:.2f} GB/s)",
        times | {"bytes": size, "losses": losses},
    )
    outcome.expect(found, "the checkpoint was not found")
    apart = abs(losses[0] - losses[1]) / abs(losses[0])
    outcome.expect(apart <= (1e-3 if bench.cuda else 0.0), f"the next loss differs by {apart:.1e} after a restore")
    return outcome
