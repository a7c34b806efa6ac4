"""The commands. Importing them fails in one line where another package hides one of ours."""

import sys
from importlib.util import find_spec
from pathlib import Path


def hidden(root: Path) -> list[str]:
    """Returns what is imported in place of the packages under ``root``; nothing if all are ours."""
    found = []
    for name in ("pipeline", "models"):
        spec = find_spec(name)
        places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
        place = next((place for place in places if place), f"nothing named {name}")
        if Path(place).resolve() != root.resolve() / name / "__init__.py":
            found.append(place)
    return found


if places := hidden(Path(__file__).parents[1]):
    sys.stderr.write(
        f"error: {places[0]} hides a package of this project; take it off PYTHONPATH, or run in another folder\n"
    )
    raise SystemExit(2)
