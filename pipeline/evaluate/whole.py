"""A figure of a set as a whole, which has no value for each row and so no interval."""

from __future__ import annotations

from pipeline.evaluate.figure import Figure
from pipeline.evaluate.rows import HeldOut


def whole(line: str, model: str, name: str, says: str, value: float, baseline: float, rows: HeldOut) -> Figure:
    """For information: the value of a set, drawn for ``rows``, and that of its baseline."""
    return Figure(
        line=line,
        model=model,
        name=name,
        says=f"{model}: {says}",
        value=value,
        baseline=baseline,
        difference=value - baseline,
        rows=len(rows),
        split=rows.split,
    )
