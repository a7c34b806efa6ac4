"""The JSON schema of a configuration, by which editors complete and check the YAML.

Types and bounds are those of the dataclasses, and descriptions are the ``Attributes`` of their docstrings.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

from pipeline.build import all_stages
from pipeline.config import PRESETS, config_type, sections
from pipeline.graph.stages import Stage
from pipeline.parse import adapter

PRESET = {"enum": list(PRESETS), "description": "Sizes of models and trainings; single fields win over it."}
SCALE = {"type": "number", "exclusiveMinimum": 0, "default": 1}
SCALE["description"] = "Every training takes this many times its samples and decay, and its warmup stays."


def dataclasses_in(kind: type) -> Iterator[type]:
    """Yields a dataclass and all those that its fields hold."""
    yield kind
    for part in get_type_hints(kind).values():
        if dataclasses.is_dataclass(part) and isinstance(part, type):
            yield from dataclasses_in(part)


def descriptions(kind: type) -> dict[str, str]:
    """Returns what the docstrings of a dataclass and its bases say of its fields under ``Attributes``."""
    found = {}
    for base in reversed(kind.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")[2].partition("\n\n")[0]
        for entry in re.split(r"^    (?=\w)", section, flags=re.MULTILINE)[1:]:
            name, _, text = entry.partition(": ")
            found[name] = " ".join(text.replace("``", "`").split())
    return found


def schema(stages: tuple[Stage, ...] = ()) -> dict[str, Any]:
    """Returns the JSON schema of configurations with ``stages``, by default with those of installed packages, too."""
    whole: Any = config_type(stages or all_stages())
    definitions = adapter(whole).json_schema()["$defs"]
    for kind in dataclasses_in(whole):
        definitions[kind.__name__]["description"] = inspect.cleandoc(kind.__doc__ or "").partition("\n")[0]
        properties, said = definitions[kind.__name__]["properties"], descriptions(kind)
        for name, field in properties.items():
            field.pop("title", None)
            field |= {"description": said[name]} if name in said else {}
    properties = definitions["Config"]["properties"]
    for section in sections(stage for stage in whole.stages if stage.kind != "source"):
        definitions[properties[section]["$ref"].rpartition("/")[2]]["properties"]["preset"] = PRESET
    properties |= {"preset": PRESET | {"default": "paper"}, "scale": SCALE}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$ref": "#/$defs/Config", "$defs": definitions}
