"""The costs of a plan as a table, with money, and what they rest on as sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.config import TRAININGS
from pipeline.cost import estimate as cost
from pipeline.cost.estimate import (
    Ask,
    Cost,
    cores_a_gpu,
    decode_seconds,
    embedding_bytes,
    encode_seconds,
    picture_bytes,
    rate,
)
from pipeline.cost.flops import clip_size, model_size
from pipeline.progress import duration
from pipeline.settings import Prices

HEAD = ("stage", "time", "start-up", "GPU hours", "core hours", "disk", "read", "written", "requests")
LEARNERS = ("ar_prior", "diffusion_prior", "decoder")  # they learn from embeddings
ROOM = 0.8  # of a GPU's memory for what a training holds besides activations
KEPT_BYTES = 20  # a parameter: a checkpoint's, and the gradient


def money(one: Cost, prices: Prices) -> float:
    """What the machines, requests and bytes of a stage cost. Storage is paid by the month, and apart."""
    hours = one.seconds / 3600
    machines = hours * (one.cores * prices.core_hour + one.gpus * prices.gpu_hour)
    requests = (one.puts * prices.put_1000 + one.gets * prices.get_1000) / 1000
    return machines + requests + one.read / 1e9 * prices.egress_gb


def table(costs: Mapping[str, Cost], prices: Prices) -> Iterator[str]:
    """One line a stage, and their sum. Money is a column where there are prices."""
    priced = prices != Prices(currency=prices.currency)
    head = (*HEAD, prices.currency) if priced else HEAD
    rows = [head, *(_row(name, one, prices, priced) for name, one in costs.items())]
    names = ("seconds", "startup", "disk", "read", "written", "gets", "puts")
    total = Cost(**{name: sum(getattr(one, name) for one in costs.values()) for name in names})
    hours = [sum(one.seconds / 3600 * getattr(one, kind) for one in costs.values()) for kind in ("gpus", "cores")]
    last = _row("all", total, prices, priced)
    rows.append((*last[:3], *map(_hours, hours), *last[5:9]))
    if priced:
        rows[-1] = (*rows[-1], f"{sum(money(one, prices) for one in costs.values()):,.2f}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        yield "  " + "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
    if priced and prices.storage_tb_month:
        yield f"storage: {total.disk / 1e12 * prices.storage_tb_month:,.2f} {prices.currency} a month"


def _row(name: str, one: Cost, prices: Prices, priced: bool) -> tuple[str, ...]:
    hours = one.seconds / 3600
    cells = (
        name,
        duration(one.seconds),
        duration(one.startup),
        _hours(hours * one.gpus),
        _hours(hours * one.cores),
        *(size(value) for value in (one.disk, one.read, one.written)),
        f"{one.gets + one.puts:,.0f}",
    )
    return (*cells, f"{money(one, prices):,.2f}") if priced else cells


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def size(value: float) -> str:
    """'1.2 GB': bytes, by thousands."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if value >= 99.5 or unit == "B" else f"{value:.2g} {unit}"
        value /= 1000
    return f"{value:,.1f} PB"


# --- sentences --------------------------------------------------------------------------------------------------------


def remarks(costs: Mapping[str, Cost], ask: Ask) -> Iterator[str]:
    """CPU:GPU ratio, embeddings ahead against on the fly, what does not fit, and what is assumed."""
    if "embeddings" in costs:
        yield _ratio(ask)
        yield from (_ahead(stage, ask) for stage in LEARNERS if stage in ask.recipes["bundle"]["models"])
    if ask.fleet:
        yield from _too_large(costs, ask)
        if idle := [stage for stage in TRAININGS if stage in costs and 1 < costs[stage].gpus < ask.fleet.count]:
            yield f"{', '.join(idle)}: lanes leave GPUs idle; as many workers as lanes can train"
    yield from _assumptions(costs, ask)


def _ratio(ask: Ask) -> str:
    decode, encode = decode_seconds(ask), encode_seconds(ask)
    who = f"one {ask.fleet.name}" if ask.fleet else "one core"
    return (
        f"embeddings: {who} encodes {1 / encode:,.0f} pairs/s, one core decodes {1 / decode:,.0f} pictures/s: "
        f"{cores_a_gpu(ask):.2g} decoding cores for each encoder"
    )


def _ahead(stage: str, ask: Ask) -> str:
    """Reading embeddings that were made ahead, against making them for every sample."""
    samples, held = getattr(ask.config, stage).samples, embedding_bytes(ask)
    clip = clip_size(ask.config.clip)
    again = clip.image + (0 if stage == "decoder" else clip.text)
    seconds = samples * encode_seconds(ask) * again / (clip.image + clip.text)
    once = ask.rows * encode_seconds(ask)
    pictures = "" if stage == "decoder" else f", and reads {size(samples * picture_bytes(ask))} of pictures"
    unit = "GPU hours" if ask.fleet else "core hours"
    return (
        f"{stage}: ahead reads {size(samples * held)} of embeddings, made once in {_hours(once / 3600)} {unit}; "
        f"on the fly encodes for {_hours(seconds / 3600)} {unit}{pictures}"
    )


def _too_large(costs: Mapping[str, Cost], ask: Ask) -> Iterator[str]:
    memory = ask.fleet.device.memory * ROOM  # type: ignore[union-attr]
    for stage in TRAININGS:
        if stage in costs and costs[stage].gpus and not getattr(ask.config.run, stage).sharded:
            held = KEPT_BYTES * model_size(ask.config, stage).parameters
            if held > memory:
                yield (
                    f"{stage}: weights, average, gradient and moments take {size(held)}, more than {ROOM:.0%} of one "
                    f"GPU's memory; set run.{stage}.sharded"
                )


def _assumptions(costs: Mapping[str, Cost], ask: Ask) -> Iterator[str]:
    by_basis: dict[str, list[str]] = {}
    for stage, one in costs.items():
        by_basis.setdefault(one.basis, []).append(stage)
    said = {"measured": "measured and scaled", "counted": "counted from arithmetic", "guess": "guessed"}
    yield "; ".join(f"{said[basis]}: {', '.join(stages)}" for basis, stages in by_basis.items())
    if ask.fleet and "counted" in by_basis:
        device, bf16 = ask.fleet.device, rate(ask, "bf16", [])
        yield (
            f"assumed: one {ask.fleet.name} reaches {bf16 / device.peak:.0%} of {device.peak / 1e12:,.0f} TFLOP/s in "
            f"bf16 (a training that was measured on a GPU: its own share), {cost.FP32_UTILISATION:.0%} of "
            f"{device.fp32 / 1e12:g} in fp32, and starting takes {cost.START_SECONDS['gpus']:.0f} s"
        )
    if "pairs" in costs and costs["pairs"].basis != "measured":
        yield (
            f"assumed: {1000 * cost.CORE_SECONDS['pairs']:.0f} ms of a core to fetch a picture and "
            f"{size(picture_bytes(ask))} to store it"
        )
    if "embeddings" in costs and "embeddings" not in ask.profile.stages:
        yield f"assumed: {1000 * decode_seconds(ask):.0f} ms of a core to decode a picture for CLIP"
    guessed = set(by_basis.get("guess", ()))
    if rows := [name for name in cost.CORE_SECONDS if name in guessed - {"pairs"}]:
        each = ", ".join(f"{name} {1e6 * cost.CORE_SECONDS[name]:.0f}" for name in rows)
        yield f"assumed: microseconds of a core for a row: {each}"
    if guessed & {*TRAININGS, "embeddings", "samples", "evaluation"}:
        yield f"assumed: {cost.CORE_FLOPS / 1e9:.0f} GFLOP/s a core; a probe or a run measures it"
