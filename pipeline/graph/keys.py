"""Keys of artefacts, which are known before anything has run (docs/store.md).

key = sha256 of the stage's name and version, the recipe fields that differ from their defaults, and the keys of all
inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from pipeline.store.records import digest


def differences(recipe: Any) -> dict[str, Any]:
    """Returns the fields of a (nested) recipe that differ from their defaults, as plain JSON values."""
    # Defaults stay out of keys, so that a new field with a default moves no key.
    result: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            if inner := differences(value):
                result[field.name] = inner
            continue
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if value != default:
            result[field.name] = _plain(value)
    return result


def flatten(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """Returns all fields of a (nested) recipe by dotted name, as plain JSON values."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            result |= flatten(value, f"{prefix}{field.name}.")
        else:
            result[prefix + field.name] = _plain(value)
    return result


def defaults(recipe: type, prefix: str = "") -> dict[str, Any]:
    """Returns the defaults of a (nested) recipe by dotted name, as ``flatten`` does; required fields have none."""
    result: dict[str, Any] = {}
    hints = get_type_hints(recipe)
    for field in dataclasses.fields(recipe):
        if dataclasses.is_dataclass(hints[field.name]):
            result |= defaults(hints[field.name], f"{prefix}{field.name}.")
        elif field.default_factory is not dataclasses.MISSING:
            result[prefix + field.name] = _plain(field.default_factory())
        elif field.default is not dataclasses.MISSING:
            result[prefix + field.name] = _plain(field.default)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def artifact_key(stage: str, version: int, recipe: Any, inputs: Mapping[str, str]) -> str:
    """Returns the key of an artefact, given the keys of its inputs in the order in which its stage names them."""
    return digest([stage, version, differences(recipe), [[name, key] for name, key in inputs.items()]])


def trajectory(stage: str, version: int, recipe: Any, inputs: Mapping[str, str]) -> str:
    """Returns the trajectory of a training, from the keys of inputs that may not be made yet."""
    # Without the length, so that a longer training goes on from the checkpoints of a shorter one. With a decay the
    # length counts, as the learning rate falls to its end.
    differing = {k: v for k, v in differences(recipe).items() if k != "samples" or recipe.decay}
    return digest(["trajectory", stage, version, differing, sorted(inputs.items())])


def recipe_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns the differences of two flattened recipes, such as "model.dropout 0.0 -> 0.1"."""
    names = sorted(now.keys() | then.keys())
    return [f"{k} {then.get(k)} -> {now.get(k)}" for k in names if now.get(k) != then.get(k)]
