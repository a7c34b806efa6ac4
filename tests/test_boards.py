"""What Grafana would not import or show is found in a dashboard. Those that we ship are read with what they show."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.boards import expressions
from tests.site import DOCS

BOARD = json.loads((DOCS / "serve-grafana.json").read_text())
FAULTS: dict[str, Callable[[Any], Any]] = {
    "without annotations": lambda board: board.pop("annotations"),
    "a misspelt unit": lambda board: board["panels"][0]["fieldConfig"]["defaults"].update(unti="s"),
    "a misspelt field of a query": lambda board: board["panels"][1]["targets"][0].update(legend="x"),
    "a misspelt field of a panel": lambda board: board["panels"][2].update(gridPosition={}),
    "panels that overlap": lambda board: board["panels"][1]["gridPos"].update(x=0),
    "a variable that nobody declares": lambda board: board["panels"][0]["targets"][0].update(expr="up{job=$job}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_grafana_would_not_read_is_found(tmp_path: Path, fault: str) -> None:
    board = copy.deepcopy(BOARD)
    file = tmp_path / "board.json"
    file.write_text(json.dumps(board))
    assert expressions(file)
    FAULTS[fault](board)
    file.write_text(json.dumps(board))
    with pytest.raises(AssertionError):
        expressions(file)
