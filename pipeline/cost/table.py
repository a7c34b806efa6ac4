"""Writes a plan's costs as a table, with money, and says on what stages run and what the costs rest on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from models.sampling_config import PRIORS
from pipeline.cost import estimate as assumed
from pipeline.cost.devices import Fleet
from pipeline.cost.estimate import (
    Cost,
    PlanInput,
    cores_a_gpu,
    decode_seconds,
    decoders_a_gpu,
    driver_seconds,
    encode_seconds,
    estimate,
    rate,
    resources,
    row_bytes,
    row_seconds,
    save,
    step_of,
    step_seconds,
    worker_memory,
)
from pipeline.cost.schedule import elapsed
from pipeline.graph.resources import amount_of
from pipeline.progress import counted, duration
from pipeline.settings import Prices

HEAD = ("stage", "time", "start-up", "GPU hours", "core hours", "disk")
SPREAD = "least to most"
MONTH_S = 30 * 86_400.0
BASES = {"measured": "measured and scaled", "counted": "counted from arithmetic", "guess": "guessed"}


def money(gpu_hours: float, core_hours: float, prices: Prices) -> float:
    """Returns what machines cost. Storage is paid by the month, and apart."""
    return core_hours * prices.core_hour + gpu_hours * prices.gpu_hour


def cost_table(
    costs: Mapping[str, Cost], seconds: float, prices: Prices, between: tuple[float, float] | None = None
) -> Iterator[str]:
    """Yields one line a stage, and their sum, which takes ``seconds``, or something ``between`` the two.

    Money is a column where there are prices; the last one says between what a time lies, where any was repeated.
    """
    rows: list[tuple[str, ...]] = [(*HEAD, prices.currency)]
    total = [0.0] * 5
    for name, one in costs.items():
        hours = one.seconds / 3600
        values = [one.seconds, one.startup, hours * one.gpus, hours * one.cores, one.disk]
        total = [a + b for a, b in zip(total, values, strict=True)]
        rows.append(_row(name, values, prices))
    rows.append(_row("all", [seconds, *total[1:]], prices))
    shown = [row if _priced(prices) else row[:-1] for row in rows]
    if between:
        spreads = [SPREAD, *(said_between(cost.between) for cost in costs.values()), said_between(between)]
        shown = [(*row, spread) for row, spread in zip(shown, spreads, strict=True)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(["", row[0].ljust(len(first)), *rest])
    if prices.storage_tb_month:
        yield f"storage: {total[-1] / 1e12 * prices.storage_tb_month:,.2f} {prices.currency} a month"


def elapsed_between(costs: Mapping[str, Cost], ask: PlanInput) -> tuple[float, float] | None:
    """Returns what ``elapsed`` is if every stage takes its least and its most seconds; None where none was repeated."""
    if not any(cost.between for cost in costs.values()):
        return None

    def whole(most: bool) -> float:
        ends = {name: replace(one, seconds=one.between[most]) if one.between else one for name, one in costs.items()}
        return elapsed(ends, ask)

    return whole(False), whole(True)


def said_between(between: tuple[float, float] | None) -> str:
    """Returns for example "1 min 10 s to 1 min 30 s"; "" for what was not repeated."""
    return f"{duration(between[0])} to {duration(between[1])}" if between else ""


def _priced(prices: Prices) -> bool:
    return replace(Prices(), currency=prices.currency) != prices


def second_prior(costs: Mapping[str, Cost], ask: PlanInput) -> Iterator[str]:
    """Yields what GPUs cost for a prior that sampling does not take, and how to leave it out."""
    taken, prices = PRIORS[ask.config.bundle.sampling.prior], ask.config.run.prices
    for name in PRIORS.values():
        if name != taken and name in costs and (hours := costs[name].seconds / 3600 * costs[name].gpus):
            paid = f", {money(hours, 0, prices):,.2f} {prices.currency}" if _priced(prices) else ""
            spent = f"{name} takes {_hours(hours)} GPU hours{paid}"
            yield f"{spent}, and sampling takes {taken}; leave it out of bundle.models to save them"


def _row(name: str, values: list[float], prices: Prices) -> tuple[str, ...]:
    seconds, startup, gpu_hours, core_hours, disk = values
    paid = f"{money(gpu_hours, core_hours, prices):,.2f}"
    return name, duration(seconds), duration(startup), _hours(gpu_hours), _hours(core_hours), size(disk), paid


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def size(value: float) -> str:
    """Returns bytes by thousands, such as '1.2 GB'."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if value >= 99.5 or unit == "B" else f"{value:.2g} {unit}"
        value /= 1000
    return f"{value:,.1f} PB"


def remarks(costs: Mapping[str, Cost], ask: PlanInput, verbose: bool = True) -> Iterator[str]:
    """Yields sentences: a second prior, what to rent; if ``verbose`` also rates, steps, and what is assumed."""
    yield from second_prior(costs, ask)
    by_basis: dict[str, list[str]] = {}
    for stage, cost in costs.items():
        by_basis.setdefault(cost.basis, []).append(stage)
    yield "; ".join(f"{BASES[basis]}: {', '.join(stages)}" for basis, stages in by_basis.items())
    if "embeddings" in costs and verbose:
        who = f"one {ask.gpu or 'GPU'}" if costs["embeddings"].gpus else "one core"
        needed, taken = round(cores_a_gpu(ask), 1), decoders_a_gpu(ask)
        said = f"{needed:g} decoding cores for each encoder"
        if costs["embeddings"].gpus and needed > taken + 0.5:
            said = f"{counted(taken, 'decoding core')} for each encoder, which waits for them"
        most = 1 / driver_seconds(ask)
        if costs["embeddings"].gpus / encode_seconds(ask) > most:
            enough = max(1, round(most * encode_seconds(ask)))
            said += f"; Ray's driver hands on {most:,.0f} images/s: {counted(enough, 'GPU')} would be as fast"
        yield (
            f"embeddings: {who} encodes {1 / encode_seconds(ask):,.0f} pairs/s, one core decodes "
            f"{1 / decode_seconds(ask):,.0f} images/s: {said}"
        )
    if any(cost.gpus and cost.basis == "counted" for cost in costs.values()):
        yield from _months(costs, ask)
        yield from _steps(costs, ask, verbose)
    if not verbose:
        return
    if any(cost.gpus and cost.basis == "counted" for cost in costs.values()):
        yield from _rare_saves(costs, ask)
        device, bf16 = ask.device, rate(ask, "bf16")
        yield (
            f"assumed: one {ask.gpu or 'GPU'} reaches {bf16 / device.peak:.0%} of {device.peak / 1e12:,.0f} TFLOP/s in "
            f"bf16 (a training that was measured on a GPU: its own share), {assumed.FP32_UTILISATION:.0%} of "
            f"{device.fp32 / 1e12:g} in fp32; starting takes {assumed.START_SECONDS['gpus']:.0f} s, compiling a layer "
            f"{assumed.COMPILE_SECONDS:.0f} s, launching a kernel {1e6 * assumed.LAUNCH_SECONDS:.0f} us"
        )
    guessed = by_basis.get("guess", ())
    rows = {name: row_seconds(name, ask.rows, ask) for name in guessed}
    if rows := {name: seconds for name, seconds in rows.items() if seconds}:
        yield f"assumed: microseconds of a core for a row: {', '.join(f'{n} {1e6 * s:.0f}' for n, s in rows.items())}"
    for name in guessed:
        if ask.graph[name].kind == "source" and (workers := resources(name, ask)[0]) > 1:
            alone = duration(ask.rows * row_seconds(name, ask.rows, ask))
            yield f"{name}: a list of many files, read by {workers} workers; a list of one file takes {alone}"
    if held := {name: row_bytes(name, ask) for name in guessed if ask.graph[name].row_bytes}:
        yield f"assumed: bytes of a row in the store: {', '.join(f'{name} {size(one)}' for name, one in held.items())}"
    if any(ask.graph[stage].kind in ("training", "result") for stage in guessed):
        yield f"assumed: {assumed.CORE_FLOPS / 1e9:.0f} GFLOP/s a core; a probe or a run measures it"


def _months(costs: Mapping[str, Cost], ask: PlanInput) -> Iterator[str]:
    """Yields the number of GPUs, or the scale, that would bring trainings of over three months down to one."""
    trained = {name: cost.seconds for name, cost in costs.items() if cost.gpus and ask.graph[name].kind == "training"}
    if slow := sorted((name for name in trained if trained[name] > 3 * MONTH_S), key=lambda name: -trained[name]):
        most = max(trained[name] / MONTH_S for name in slow)
        gpus = math.ceil(most * max(costs[name].gpus for name in slow))
        takes = ", ".join(f"{name} {duration(trained[name])}" for name in slow)
        yield (
            f"{takes}: about {gpus} {ask.gpu or 'GPUs'} would take a month for each, as would {1 / most:.0%} of the "
            "samples (scale); preset=small is for a few GPUs"
        )


def _rare_saves(costs: Mapping[str, Cost], ask: PlanInput) -> Iterator[str]:
    trained = {stage: cost for stage, cost in costs.items() if cost.gpus and ask.graph[stage].kind == "training"}
    saves = {stage: save(stage, ask, round(cost.gpus)) for stage, cost in trained.items()}
    rare = {n: one for n, one in saves.items() if one[1] > getattr(ask.config.run, n).checkpoint_every_s}
    if rare:
        each = ", ".join(f"{name} {size(held)} every {duration(every)}" for name, (held, every) in rare.items())
        yield f"checkpoints of a worker, at an assumed {size(assumed.SAVED_BYTES)}/s: {each}"


def counted_trainings(costs: Mapping[str, Cost], ask: PlanInput) -> dict[str, int]:
    """Returns the GPUs of those trainings whose costs are counted."""
    trained = {stage: round(cost.gpus) for stage, cost in costs.items() if ask.graph[stage].kind == "training"}
    return {stage: gpus for stage, gpus in trained.items() if gpus and costs[stage].basis == "counted"}


def _steps(costs: Mapping[str, Cost], ask: PlanInput, verbose: bool) -> Iterator[str]:
    """Yields what a step of each training takes of a GPU, which of them wait for kernels, and how many GPUs pay."""
    trained = counted_trainings(costs, ask)
    steps = {stage: step_of(stage, ask, gpus) for stage, gpus in trained.items()}
    if not steps:
        return
    parts = (
        f"{stage} {counted(step.rows, 'row')}{f', {step.at_once:,} at once' * (step.passes > 1)}, {size(step.memory)} "
        f"and {size(worker_memory(stage, ask, trained[stage]))} of its host"
        for stage, step in steps.items()
    )
    if verbose:
        yield f"a step on a GPU of {size(ask.device.memory)}: {'; '.join(parts)}"
    waiting = []
    for stage, gpus in trained.items():
        computing, launching = step_seconds(stage, ask, gpus)
        if launching > computing and not verbose:
            waiting.append(stage)
        elif launching > computing:
            yield (
                f"{stage}: its host takes {1000 * launching:.0f} ms to launch the kernels of a step, one GPU "
                f"{1000 * computing:.0f} ms to compute it"
            )
        if (worth := worth_renting(stage, ask, gpus)) < gpus:
            pays = f"{worth} of {gpus} GPUs {'is' if worth == 1 else 'are'} worth renting"
            yield f"{stage}: {pays}; beyond, twice as many save less than a quarter of its time"
    if waiting:
        yield f"{', '.join(waiting)}: steps are so small that a faster GPU would not be quicker"


def worth_renting(stage: str, ask: PlanInput, gpus: int) -> int:
    """Returns the number of GPUs beyond which twice as many save less than a quarter of a training's time."""
    count = 1
    while count < gpus:
        now, then = (estimate(stage, replace(ask, fleet=Fleet(n, ask.gpu))) for n in (count, 2 * count))
        if then.seconds > 0.75 * now.seconds:
            break
        count *= 2
    return min(count, gpus)


def places(costs: Mapping[str, Cost], ask: PlanInput) -> str:
    """Returns for example "runs on 8 H100 (embeddings, decoder), 2 cores (all others)"."""
    found: dict[str, list[str]] = {}
    for stage, cost in costs.items():
        found.setdefault(devices_of(cost, ask), []).append(stage)
    if len(found) > 1:
        most = max(found, key=lambda where: len(found[where]))
        found.pop(most)
        found[most] = ["all others"]
    return "runs on " + ", ".join(f"{where} ({', '.join(stages)})" for where, stages in found.items())


def devices_of(cost: Cost, ask: PlanInput) -> str:
    """Returns the GPUs of a stage, or its cores, such as "8 H100"."""
    if not cost.gpus:
        return amount_of(cost.cores, "core")
    return f"{cost.gpus:g} {ask.gpu}" if ask.gpu else amount_of(cost.gpus, "GPU")
