"""Decides whether a bundle may become the release. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.evaluate.figure import count, measured, short
from pipeline.release.compare import Change, Figures
from pipeline.settings import ReleaseGates

UNKNOWN = {"holds": None, "note": ""}  # stands for a figure that an evaluation does not have


def failing(gates: ReleaseGates, old: Figures, new: Figures, changes: Sequence[Change]) -> list[str]:
    """Returns a line for each gate that the new bundle fails; a bundle without any measured figure fails.

    Args:
        gates: Gates to pass.
        old: The figures of the release.
        new: The figures of the new bundle.
        changes: Differences of the figures, row by row.

    Raises:
        UserError: A figure is to be ignored that neither evaluation has.
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
        # Worse beyond chance and beyond the tolerance: the whole interval of the gain lies below it.
        if name not in gates.ignore and change.gain[1] < -gates.tolerance * abs(change.then):
            low, high = change.interval
            lines.append(
                f"{name} is worse: {short(change.then)} -> {short(change.now)}, "
                f"difference {short(change.difference)} ({short(low)} to {short(high)})"
            )
    found = list(new.values())
    if found and not measured(found) and not lines and (gates.claims or gates.figures):
        return [f"no gate can be judged. {count(found)}"]
    return lines


def unjudged(gates: ReleaseGates, old: Figures, new: Figures, changes: Sequence[Change]) -> list[str]:
    """Returns a line for each reason why figures were not judged by any gate, with these figures.

    These are figures that are not measured for both bundles, and those whose rows cannot be compared one by one, but
    none that ``failing`` names. The arguments are those of ``failing``.
    """
    compared = {(change.model, change.name) for change in changes}
    found: dict[str, list[str]] = {}
    for model, name in {**old, **new} if gates.claims or gates.figures else ():
        then, now = (figures.get((model, name), UNKNOWN) for figures in (old, new))
        why = ""
        if then["holds"] is None and now["holds"] is None:
            why = now["note"] or then["note"]
        elif now["holds"] is None:
            why = "" if gates.claims and then["holds"] else "measured for the release only"
        elif then["holds"] is None:
            why = "measured for this bundle only"
        elif gates.figures and now.get("values") and (model, name) not in compared:
            why = "not compared row by row, as a value is not finite"
        if why and f"{model}.{name}" not in gates.ignore:
            found.setdefault(why, []).append(f"{model}.{name}")
    return [f"{', '.join(names)}: {why}" for why, names in found.items()]
