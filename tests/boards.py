"""Dashboards of Grafana: what it needs of a file to show it. No Grafana runs here, but its own types read the file."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

WIDTH = 24  # columns of a dashboard
REQUIRED = {"annotations", "schemaVersion", "templating"}  # by Grafana's schema
register_default_plugins()  # panels and queries of each kind have fields of their own


def unknown(ours: Any, theirs: Any, path: str = "$") -> Iterator[str]:
    """Yields the paths of values that Grafana's types do not know, or read as others."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name, value in ours.items():
            yield from unknown(value, theirs.get(name), f"{path}.{name}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from unknown(*pair, f"{path}[{i}]")
    elif ours != theirs:
        yield path


def expressions(file: Path) -> list[str]:
    """Returns the queries of a dashboard. Fails for one that Grafana would not import, or show as it was drawn."""
    text = file.read_text()
    board = json.loads(text)
    assert board.keys() >= REQUIRED
    assert [*unknown(board, json.loads(JSONEncoder().encode(Dashboard.from_json(board))))] == []
    assert board["title"]
    assert re.fullmatch(r"[\w-]{1,40}", board["uid"])
    variables = {each["name"] for each in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__all"} == variables
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: Counter[tuple[int, int]] = Counter()
    found = []
    for panel in panels:
        place, targets = panel["gridPos"], panel["targets"]
        assert place["x"] + place["w"] <= WIDTH
        rows = range(place["y"], place["y"] + place["h"])
        cells.update((x, y) for x in range(place["x"], place["x"] + place["w"]) for y in rows)
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in targets}) == len(targets)
        found += [target["expr"] for target in targets]
    assert set(cells.values()) == {1}, "panels overlap"
    assert all(text.count(opening) == text.count(closing) for opening, closing in ("()", "{}", "[]") for text in found)
    return found
