"""What a bundle must show before it becomes the release. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.evaluate.figure import short
from pipeline.release_compare import Change, Figures


@dataclass(frozen=True)
class ReleaseGates:
    """``claims``: whatever held for the release holds for the new bundle. ``figures``: nothing is worse, row by row, by
    more than chance and by more than ``tolerance``, a share of the release's figure. ``ignore``: figures that no gate
    asks about, as "decoder.background"."""

    claims: bool = True
    figures: bool = True
    tolerance: float = 0.0
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance: {self.tolerance} is below 0")


def failing(gates: ReleaseGates, old: Figures, new: Figures, changes: Sequence[Change]) -> list[str]:
    """A line for everything that keeps the new bundle from being the release; empty if all gates hold.

    Raises UserError if a figure is to be ignored that neither evaluation has.
    """
    known = {f"{model}.{name}" for model, name in old.keys() | new.keys()}
    if unknown := set(gates.ignore) - known:
        raise UserError(f"release.ignore: no figure is called {min(unknown)}; known are {', '.join(sorted(known))}")
    lines = []
    for (model, name), figure in old.items() if gates.claims else ():
        if figure["holds"] and f"{model}.{name}" not in gates.ignore:
            holds = new.get((model, name), {}).get("holds")
            if not holds:
                became = "fails now" if holds is False else "is not measured now"
                lines.append(f"{model}.{name} held for the release and {became}")
    for change in changes if gates.figures else ():
        name = f"{change.model}.{change.name}"
        if name not in gates.ignore and change.gain[1] < -gates.tolerance * abs(change.then):
            low, high = change.interval
            lines.append(
                f"{name} is worse: {short(change.then)} -> {short(change.now)}, "
                f"difference {short(change.difference)} ({short(low)} to {short(high)})"
            )
    return lines
