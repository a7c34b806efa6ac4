"""Dashboards of Grafana: what it needs of a file to show it. No Grafana runs here."""

import json
import re
from collections import Counter
from pathlib import Path

WIDTH = 24  # columns of a dashboard


def expressions(file: Path) -> list[str]:
    """Returns the queries of a dashboard. Fails for one that Grafana would not import, or show as it was drawn."""
    text = file.read_text()
    board = json.loads(text)
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
