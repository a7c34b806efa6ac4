"""Typed, frozen values from plain ones. pydantic reads them; a mistake is one line that names the nearest valid key.

A configuration is made of frozen dataclasses. Bounds of one field stand in its type, such as ``NonNegativeInt``, and
what several fields must fulfil together in ``__post_init__``, which raises ValueError.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, reduce
from itertools import chain
from operator import getitem
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from pipeline.errors import UserError, did_you_mean
from pipeline.local import open_local

UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}  # of counts that a person writes
SHORTHANDS = ("preset", "scale")  # values of a configuration that stand for those of many fields
# What others call the fields of a training's recipe.
ELSEWHERE = {
    "lr": "learning_rate",
    "batch_size": "batch",
    "epochs": "samples, the number of rows times the epochs",
    "steps": "samples, batch times the steps",
    "max_steps": "samples, batch times the steps",
    "gradient_clip_val": "clip_norm",
    "max_grad_norm": "clip_norm",
    "mixed_precision": "precision",
}
PLACES = 3  # of a key that stands elsewhere, in a message
MAX_ALIASED = 10_000  # values that all aliases of a document stand for together; nested ones multiply

_EXPECTED = {
    "dataclass_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
}
_BOUNDS = {
    "greater_than": ("gt", "is not above"),
    "greater_than_equal": ("ge", "is below"),
    "less_than": ("lt", "is not below"),
    "less_than_equal": ("le", "is above"),
}


class ContentFile(str):
    """A file that a recipe names.

    Its value is the sha256 of its content, because the content counts and not the place, which is ``path``. A file
    that is named by its sha256 lies in the store, and its ``path`` is "".
    """

    path: str

    @classmethod
    def at(cls, path: str, where: str = "") -> ContentFile:
        """Returns the file at a path; ``where`` begins the message of the UserError if it cannot be read."""
        if re.fullmatch(r"[0-9a-f]{64}", path):
            named = cls(path)
            named.path = ""
            return named
        place = Path(os.path.expanduser(path)).absolute()
        try:
            with open_local(place) as f:
                file = cls(hashlib.file_digest(f, "sha256").hexdigest())
        except OSError as e:
            raise UserError(f"{where and f'{where}: '}{path} cannot be read ({e.strerror})") from None
        file.path = str(place)
        return file

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def read(path: str) -> ContentFile:
            try:
                return cls.at(path)
            except UserError as e:
                raise ValueError(str(e)) from None

        return core_schema.no_info_after_validator_function(read, core_schema.str_schema())


def parse(kind: Any, value: Any, where: str = "") -> Any:
    """Returns ``value`` as ``kind``: a frozen dataclass, or the type of one of its fields.

    ``where`` is the dotted name that messages begin with, or "--" for options of a command. Raises UserError for
    unknown keys, wrong types and values that are out of bounds or that a dataclass refuses.
    """
    given = [_plain(kind, value)]
    try:
        try:
            return _validate(kind, given)
        except ValidationError as e:
            _put_numbers(given, e.errors(include_url=False))
            return _validate(kind, given)
    except ValidationError as e:
        errors = e.errors(include_url=False)
        unknown = (error for error in errors if error["type"] == "unexpected_keyword_argument")
        raise UserError(_message(kind, next(unknown, errors[0]), where)) from None


class _Loader(yaml.SafeLoader):
    """Refuses a mapping with two values for one key, of which PyYAML drops the first, and aliases that multiply."""

    def __init__(self, text: str):
        super().__init__(text)
        # Values of each node, with those below it, by the node's id; those in progress have none.
        self._sizes: dict[int, int] = {}
        self._aliased = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if node is None:
            return node
        if isinstance(event, yaml.AliasEvent):
            size = self._sizes.get(id(node))
            self._aliased += size or MAX_ALIASED
            if size is None or self._aliased > MAX_ALIASED:
                said = f"*{event.anchor} repeats over {MAX_ALIASED:,} values, or itself; write them out"
                raise yaml.MarkedYAMLError(None, None, said, node.start_mark)
        elif isinstance(node, yaml.CollectionNode):
            below = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            self._sizes[id(node)] = 1 + sum(self._sizes[id(each)] for each in below)
        else:
            self._sizes[id(node)] = 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"{key.value} stands twice; make one of it", key.start_mark)
                seen.add(key.value)
        return node


def load_yaml(text: str) -> Any:
    """Returns the value of a YAML document. Raises ValueError, in one line, where it is none."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError("lists or mappings are nested too deeply") from None
    except (yaml.YAMLError, ValueError) as e:  # a ValueError for a date or a number that is none
        raise ValueError(" ".join(str(e).split())) from e


def read_value(text: str, where: str) -> Any:
    """Returns the value after the = of a word, as YAML has it. Raises UserError that names ``where`` for another."""
    try:
        return load_yaml(text)
    except ValueError:
        raise UserError(f"{where}: {text} is not YAML; write a number, a word, or a list such as [a, b]") from None


def read_count(text: str) -> int | None:
    """Returns a count that a person has written, such as 7000, 7_000, 100k, 1.5B or 1e6; None if it is not one."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\+?\d\d?)?)([kMBG]?)", text.replace("_", "").replace(",", ""))
    number = float(found[1]) * UNITS[found[2]] if found else 0.5
    return round(number) if abs(number - round(number)) < 1e-6 else None


def _validate(kind: Any, given: list[Any]) -> Any:
    # Through JSON, because lists are tuples there without numbers being texts.
    return adapter(kind).validate_json(json.dumps(given, default=str))[0]


def _put_numbers(given: Any, errors: list[ErrorDetails]) -> None:
    """Puts the number in place of a text such as 1e-4 or 100k, or of 2.0 for a whole one, as YAML 1.1 reads them."""
    for error in errors:
        value, whole = error["input"], error["type"] == "int_type"
        if (whole or error["type"] == "float_type") and isinstance(value, str | float):
            with suppress(ValueError):
                count = read_count(value) if whole and isinstance(value, str) else None
                number = float(value if count is None else count)
                holder = reduce(getitem, error["loc"][:-1], given)
                if not whole or number.is_integer():
                    holder[error["loc"][-1]] = int(number) if whole else number


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """Returns what reads, and describes as a JSON schema, a list of one ``kind``."""
    # A dataclass takes its rules from what it stands in, so it stands in a tuple.
    return TypeAdapter(tuple[kind], config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))


def _plain(kind: Any, value: Any) -> Any:
    """Returns ``value`` with keys of text, and with {} where YAML has a heading of a dataclass and nothing below it."""
    if isinstance(value, list | tuple):
        return [_plain(None, item) for item in value]
    if not isinstance(value, Mapping):
        return {} if value is None and dataclasses.is_dataclass(kind) else value
    known = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    nested = {field.name: field.default_factory for field in known}
    return {str(key): _plain(nested.get(key), item) for key, item in value.items()}


def _meant(kind: Any, name: str, where: str = "") -> str:
    """Returns the end of a message about an unknown key of a dataclass: what it is called here, or where it stands.

    ``where`` is the dotted name of the dataclass with a full stop, or "". A dataclass may have BESIDE, names of values
    that are taken out of a mapping before it is read.
    """
    known = [*(field.name for field in dataclasses.fields(kind)), *getattr(kind, "BESIDE", ())]
    other = ELSEWHERE.get(name, name)
    field = other.partition(",")[0]
    if field in known and not dataclasses.is_dataclass(get_type_hints(kind)[field]):
        return f"; it is called {other}"
    places = [where + place for place in sorted(_places(kind, field), key=lambda place: place.startswith("run."))]
    return f"; did you mean {' or '.join(_together(places)[:PLACES])}?" if places else did_you_mean(name, known)


def _together(places: Sequence[str]) -> list[str]:
    """Returns dotted names; those that differ in their stage alone are one, "STAGE.batch (STAGE: clip, decoder)"."""
    stages: dict[str, list[str]] = {}
    for place in places:
        prefix, stage, rest = re.fullmatch(r"(run\.|)(\w+)(.*)", place).groups()  # type: ignore[union-attr]
        stages.setdefault(f"{prefix}STAGE{rest}", []).append(stage)
    return [
        f"{form} (STAGE: {', '.join(names)})" if len(names) > 1 else form.replace("STAGE", names[0])
        for form, names in stages.items()
    ]


def _places(kind: Any, name: str, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of fields of this name in the dataclasses that a dataclass holds."""
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if prefix and field.name == name:
            yield prefix + name
        if dataclasses.is_dataclass(types[field.name]):
            yield from _places(types[field.name], name, f"{prefix}{field.name}.")


def _message(kind: Any, error: ErrorDetails, where: str) -> str:
    place, value, context = error["loc"][1:], error["input"], error.get("ctx", {})
    name = where
    for part in place:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name.strip("-") else str(part)
    match error["type"]:
        case "unexpected_keyword_argument":
            for part in place[:-1]:
                kind = get_type_hints(kind)[str(part)]
            above = name.removesuffix(str(place[-1]))
            said = f"unknown key{_meant(kind, str(place[-1]), above if above.endswith('.') else '')}"
        case "missing":
            said = "missing; it has no default"
        case "literal_error":
            words = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            said = f"{value!r} is not one of {', '.join(words)}{did_you_mean(value, words)}"
        case "value_error":
            said = str(context["error"])
        case "json_invalid":
            said = "a value has a character that is not Unicode; write it in UTF-8"
        case "too_short":
            said = f"has {context['actual_length']} entries; name {context['min_length']} or more"
        case "too_long":
            said = f"has {context['actual_length']} entries; name {context['max_length']} at most"
        case known if known in _EXPECTED:
            said = f"expected {_EXPECTED[known]}, got {value!r}"
            said += f"; write [{value}]" if known == "tuple_type" and isinstance(value, str) else ""
        case known if known in _BOUNDS:
            bound, relation = _BOUNDS[known]
            said = f"{value!r} {relation} {context[bound]:g}"
        case _:
            said = error["msg"]
    return f"{name}: {said}" if name else said


def overlay(base: Mapping[str, Any], over: Mapping[str, Any], emptying: bool = False) -> dict[str, Any]:
    """Returns ``over`` laid upon ``base``, mapping by mapping; with ``emptying`` an empty one empties another."""
    result = dict(base)
    for key, value in over.items():
        laid = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        if laid and (value or not emptying):
            result[key] = overlay(result[key], value, emptying)
        else:
            result[key] = value
    return result
