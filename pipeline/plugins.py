"""Plug-ins: what installed packages add to the pipeline by entry points. ``examples/`` has one of each group."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pipeline.errors import UserError


@cache
def plugins(group: str) -> dict[str, Any]:
    """Returns what installed packages add to a group, by name and in order of names.

    Raises UserError for a plug-in that cannot be imported, and for two of one name.
    """
    found = {}
    for point in sorted(entry_points(group=group)):
        if point.name in found:
            raise broken(group, point.name, "two packages have one of this name")
        try:
            found[point.name] = point.load()
        except Exception as e:
            raise broken(group, point.name, f"{type(e).__name__}: {' '.join(str(e).split())}") from None
    return found


def broken(group: str, name: str, why: str) -> UserError:
    """Returns the error for a plug-in that cannot be used."""
    point = sorted(entry_points(group=group, name=name))[-1]
    package = point.dist.name if point.dist else point.module
    kind = group.removeprefix("unclip.").removesuffix("s")
    return UserError(f"{kind} {name} ({point.value}) cannot be used: {why}; correct or uninstall {package}")
