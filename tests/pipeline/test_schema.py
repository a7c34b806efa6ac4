"""What an editor makes of a configuration: the JSON schema takes what the code takes, and marks what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from pipeline.config import PRESETS, SCHEMA
from pipeline.parse import overlay

ROOT = Path(__file__).parents[2]
VALIDATOR = Draft202012Validator(json.loads(SCHEMA.read_text()))
LEAST: dict[str, Any] = {"project": "p", "store": "s", "source": {"paths": ["a.csv"]}}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_fit(path: Path) -> None:
    text = path.read_text()
    VALIDATOR.validate(yaml.safe_load(text))
    line, _, _ = text.partition("\n")
    assert path.parent.joinpath(line.removeprefix("# yaml-language-server: $schema=")).resolve() == SCHEMA


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit(preset: str) -> None:
    values = yaml.safe_load((ROOT / f"pipeline/presets/{preset}.yaml").read_text())
    VALIDATOR.validate({**LEAST, **values, "preset": preset, "scale": 0.5})


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"decodr": {}}, ""),
        ({"decoder": {"model": {"guidance": 1}}}, "decoder.model"),
        ({"decoder": {"samples": "many"}}, "decoder.samples"),
        ({"decoder": {"model": {"schedule": "cosin"}}}, "decoder.model.schedule"),
        ({"run": {"pairs": {"threads": 0}}}, "run.pairs.threads"),
        ({"thresholds": {"similarity": 1}}, "thresholds.similarity"),
        ({"source": {"paths": []}}, "source.paths"),
        ({"preset": "huge"}, "preset"),
        ({"clip": {"preset": "huge"}}, "clip.preset"),
        ({"scale": 0}, "scale"),
    ],
)
def test_mistakes_are_marked_where_they_stand(changes: dict[str, Any], where: str) -> None:
    [error] = VALIDATOR.iter_errors(overlay(LEAST, changes))
    assert ".".join(map(str, error.absolute_path)) == where


def test_every_field_of_a_recipe_and_a_setting_is_explained() -> None:
    definitions = VALIDATOR.schema["$defs"]
    for name, kind in definitions.items():
        for field, value in kind["properties"].items():
            assert "description" in value or "$ref" in value, f"{name}.{field}"
