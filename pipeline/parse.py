"""Frozen dataclasses from plain YAML values, with one-line errors that name the nearest valid key."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pipeline.errors import UserError
from pipeline.local import open_local


class ContentFile(str):
    """A file that a recipe names. Its value is the sha256 of the content: what it says counts, not where it lies, which
    is ``path``; "" for one that is named by its sha256 and lies in the store."""

    path: str

    @classmethod
    def at(cls, path: str, where: str) -> ContentFile:
        """Raises UserError if it cannot be read."""
        if re.fullmatch(r"[0-9a-f]{64}", path):
            named = cls(path)
            named.path = ""
            return named
        place = Path(path).expanduser().absolute()
        try:
            with open_local(place) as f:
                file = cls(hashlib.file_digest(f, "sha256").hexdigest())
        except OSError as e:
            raise UserError(f"{where}: {path} cannot be read ({e.strerror})") from None
        file.path = str(place)
        return file


def parse(kind: Any, value: Any, where: str = "") -> Any:
    """``value`` as ``kind``: a dataclass, int, float, bool, str, ContentFile (by its path), tuple[X, ...],
    dict[str, X], Literal or X | None.

    ``where`` is the dotted name used in messages. Raises UserError for unknown keys, wrong types and values that a
    dataclass refuses.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(
                f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}{nearest(value, arguments)}"
            )
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return parse(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list, got {value!r}")
        return tuple(parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping, got {value!r}")
        return {str(k): parse(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is ContentFile:
        return ContentFile.at(_parse_scalar(str, value, where), where)
    return _parse_scalar(kind, value, where)


def _parse_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is bool or isinstance(value, bool):
        fits = kind is bool and isinstance(value, bool)
    elif kind is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
            try:
                value = float(value)
            except ValueError:
                value = str(value)
        fits = isinstance(value, int | float)
        value = float(value) if fits else value
    elif kind is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        fits = isinstance(value, int)
    else:
        fits = isinstance(value, kind)
    if not fits:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UserError(f"{where}: expected {names.get(kind, kind.__name__)}, got {value!r}")
    return value


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where or 'configuration'}: expected a mapping, got {value!r}")
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    arguments = {}
    for key, item in value.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise UserError(f"{name}: unknown key{nearest(key, fields)}")
        arguments[key] = parse(hints[key], item, name)
    for name, field in fields.items():
        if (
            name not in arguments
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise UserError(
                f"{where}.{name}: missing; it has no default" if where else f"{name}: missing; it has no default"
            )
    try:
        return kind(**arguments)
    except ValueError as e:
        raise UserError(f"{where}: {e}" if where else str(e)) from e


def nearest(word: Any, words: Any) -> str:
    """Returns the end of a message about an unknown word: the known word nearest to it, or else all of them."""
    close = difflib.get_close_matches(str(word), [str(w) for w in words], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(map(str, words)))}"


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid upon ``base``, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result
