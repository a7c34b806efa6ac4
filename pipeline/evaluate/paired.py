"""A figure that compares two values of each row."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pipeline.evaluate.figure import Figure
from pipeline.evaluate.metrics import bootstrap
from pipeline.evaluate.rows import HeldOut


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
) -> Figure:
    """``value`` [n] against ``baseline`` [n], with a 95% bootstrap interval of the mean difference over these n rows.

    It holds if the whole interval is on the side of 0 that ``claim`` names; with None there is nothing to hold.
    """
    value, baseline = value.double().cpu(), baseline.double().cpu()
    interval = bootstrap(value - baseline, seed)
    return Figure(
        line=line,
        model=model,
        name=name,
        says=f"{model}: {says}",
        value=float(value.mean()),
        baseline=float(baseline.mean()),
        difference=float((value - baseline).mean()),
        interval=interval,
        holds={"above": interval.low > 0, "below": interval.high < 0}.get(claim or ""),
        rows=len(value),
        split=rows.split,
        claim=claim,
        values=tuple(float(f"{v:.6g}") for v in value.tolist()),
    )
