"""The notebook runs from its first cell to its last, on a bundle of random weights, and is stored as it should be."""

import ast
import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.bundles import remember_bundle
from models.sampling_config import SamplingConfig
from tests.jobs.pages import CELLS, NOTEBOOK, check_commands, check_links, of_type
from tests.pipeline.sampling.bundles import publish_bundle

SIDE = 256  # of a picture in a row


def test_it_is_a_notebook_without_outputs() -> None:
    """Format 4.5, as its schema describes it."""
    document = json.loads(NOTEBOOK.read_text())
    assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
    assert document["metadata"].keys() == {"kernelspec", "language_info"}
    for cell in CELLS:
        own: dict[str, Any] = {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}
        assert cell == {name: cell[name] for name in ("cell_type", "id", "source")} | {"metadata": {}} | own
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert cell["source"] == "".join(cell["source"]).splitlines(keepends=True)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)


def test_its_links_and_commands_lead_somewhere() -> None:
    for text in of_type("markdown").values():
        check_links(NOTEBOOK, text)
        check_commands(NOTEBOOK, text)


def shown(code: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last line, if that is one."""
    body = ast.parse(code).body
    last = body[-1] if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body[:-1] if last else body, []), "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every cell shows, run in order from the folder of a notebook beside the output of a run."""
    folder = tmp_path_factory.mktemp("notebook")
    store, bundle = publish_bundle(folder)
    (folder / "docs").mkdir()
    remember_bundle(folder / "out/nano", store.url, bundle.key)
    names: dict[str, Any] = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "docs")
        found = {name: shown(code, names) for name, code in of_type("code").items()}
    assert list((folder / "docs").iterdir()) == []  # it litters nothing
    return found | {"names": names}


def test_it_makes_what_it_says(values: dict[str, Any]) -> None:
    """The bundle's pictures are of 16, 64 and 256 px."""
    assert isinstance(values["load"], SamplingConfig)
    pictures = {name: value for name, value in values.items() if isinstance(value, Image.Image)}
    assert {name: picture.size for name, picture in pictures.items()} == {
        "generate": (4 * SIDE, SIDE),
        "stages": (3 * SIDE, SIDE),
        "largest": (256, 256),
        "priors": (4 * SIDE, 2 * SIDE),
        "vary": (5 * SIDE, SIDE),
        "interpolate": (6 * SIDE, SIDE),
        "text": (6 * SIDE, SIDE),
        "components": (4 * SIDE, SIDE),
    }
    assert all(picture.mode == "RGB" for picture in pictures.values())
    assert pictures.keys() | {"load", "row", "plot", "names"} == values.keys()


def test_the_chart_shows_both_lines(values: dict[str, Any]) -> None:
    chart, names = values["plot"], values["names"]
    drawn = chart._repr_html_()
    assert "<svg" in drawn
    assert ">before</text>" in drawn
    assert ">after</text>" in drawn
    assert names["similarity"].shape == (6, 2)
    assert np.abs(names["similarity"]).max() <= 1 + 1e-5
