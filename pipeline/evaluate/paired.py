"""Figures that compare values of rows, or of a whole set of rows, with a baseline."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from pipeline.evaluate.figure import Figure
from pipeline.evaluate.metrics import bootstrap, numbered
from pipeline.evaluate.rows import HeldOut


def whole(
    line: str, model: str, name: str, says: str, value: float, baseline: float, of: HeldOut, **more: Any
) -> Figure:
    """Returns the figure of a value of all rows ``of`` a set together; ``more`` are further fields of ``Figure``."""
    known: dict[str, Any] = {"difference": value - baseline, "rows": len(of), "split": of.split}
    return Figure(line, model, name, f"{model}: {says}", value, baseline, **known | more)


def paired(
    line: str,
    model: str,
    name: str,
    says: str,
    value: Tensor,
    baseline: Tensor,
    rows: HeldOut,
    seed: int,
    claim: Literal["above", "below"] | None,
    chosen: Tensor | None = None,
) -> Figure:
    """Compares ``value`` [n] with ``baseline`` [n]: a 95% interval of the mean difference, by bootstrap over groups.

    Both are of the first n of ``rows``, or of the ``chosen`` ones, int64 [n].
    The figure holds if the whole interval is on the side of 0 that ``claim`` names; with None it is for information.
    """
    value, baseline = value.double().cpu(), baseline.double().cpu()
    groups = numbered([rows.groups[i] for i in (range(len(value)) if chosen is None else chosen.tolist())])
    interval = bootstrap(value - baseline, groups, seed)
    return whole(
        line,
        model,
        name,
        says,
        float(value.mean()),
        float(baseline.mean()),
        rows,
        difference=float((value - baseline).mean()),
        rows=len(value),
        interval=interval,
        holds={"above": interval.low > 0, "below": interval.high < 0}.get(claim or ""),
        claim=claim,
        values=rounded(value),
    )


def rounded(values: Tensor) -> tuple[float, ...]:
    """Returns the values of rows [n] to six digits, as figures keep them."""
    return tuple(float(f"{v:.6g}") for v in values.tolist())
