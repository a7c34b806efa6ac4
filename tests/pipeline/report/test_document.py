"""report.json has the fields that its reference lists, and no others."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.graph.artifacts import Artifact
from pipeline.report.document import ReportDocument, document
from pipeline.report.inputs import ComparedBundle, ReportInput
from pipeline.schema import descriptions
from pipeline.store import FolderStore
from tests.pipeline.report.made_up import bundle_of, config, graph
from tests.reference import OBJECTS, ROW_VALUES, table


@pytest.fixture
def found(store: FolderStore, made: dict[str, Artifact], tmp_path: Path) -> dict[str, Any]:
    """The document of a whole chain, compared with another one."""
    elsewhere = FolderStore(str(tmp_path))
    theirs = bundle_of(elsewhere, made, "old", 0.0, "above")
    ours = bundle_of(store, made, "documented", 0.1, "above")
    given = ReportInput(store, ours, other=ComparedBundle("old", elsewhere, theirs["bundle"]))
    return json.loads(document(given, config(), graph()))


def objects(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of the document that has a table, with its title."""
    yield "The document", found
    yield "against", found["against"]
    for title in ("stages", "figures", "samples"):
        yield from ((title, each) for each in found[title])
    yield from (("against.figures", each) for each in found["against"]["figures"])


def test_every_field_is_in_the_reference(found: dict[str, Any]) -> None:
    tables = table(["report.json"]).split("### ")[1:]
    listed = {text.partition("\n")[0]: set(fields(text)) for text in tables}
    seen = dict(objects(found))
    assert seen.keys() == listed.keys() == OBJECTS.keys()
    for title, each in objects(found):
        assert listed[title] - each.keys() <= {"not_compared"}, title
        assert each.keys() <= listed[title], title


def fields(text: str) -> list[str]:
    return [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]


def test_every_field_is_explained() -> None:
    for title, kind in OBJECTS.items():
        assert descriptions(kind).keys() - {*ROW_VALUES} == kind.__annotations__.keys() - {*ROW_VALUES}, title


def test_a_stage_that_is_not_made_has_two_fields(store: FolderStore) -> None:
    found: ReportDocument = json.loads(document(ReportInput(store, {}), config(), graph()))
    assert found["stages"]
    assert found["stages"][0] == {"stage": "source", "made": False}
