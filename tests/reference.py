"""Makes the tables that the site shows of classes, requests and metrics; ``python -m tests.reference`` writes
pipeline/schema.json.

A table of several classes has a column of defaults for each, and the fields that all of them have.
"""

import dataclasses
import inspect
import json
import re
import sys
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pipeline.build import STAGES
from pipeline.config import SCHEMA, config_type
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.run import OURS
from pipeline.release.compare import Change
from pipeline.report.document import Comparison, ReportDocument, SampleReport, StageReport
from pipeline.schema import dataclasses_in, descriptions, schema
from pipeline.training.recipes import TrainingRecipe
from serve.requests import IGNORED, REFUSED, Edit, Generation, Interpolation, Variation
from serve.settings import ServeSettings

KINDS = {kind.__name__: kind for kind in dataclasses_in(config_type())}
ENDPOINTS = {Generation: "generations", Edit: "edits", Variation: "variations", Interpolation: "interpolations"}


def default(field: dataclasses.Field[Any]) -> str:
    """Returns a field's default as the tables show it."""
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else json.dumps(field.default)


def fields(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """Returns the fields of a dataclass that are not dataclasses themselves."""
    return {
        field.name: field for field in dataclasses.fields(kind) if not dataclasses.is_dataclass(field.default_factory)
    }


def table(names: list[str]) -> str:
    """Returns the table of one class, or of several that share fields, or of the image API's requests."""
    if names[0] in REQUESTS:
        return REQUESTS[names[0]]()
    kinds = [(KINDS | {"ServeSettings": ServeSettings})[name] for name in names]
    shown, said = fields(kinds[0]), descriptions(kinds[0])
    columns = ["default"]
    if len(kinds) > 1:
        shown = {name: field for name, field in shown.items() if all(name in fields(kind) for kind in kinds)}
        holders = {field.default_factory: field.name for field in reversed(dataclasses.fields(config_type()))}
        columns = [holders[kind] for kind in kinds]
    elif issubclass(kinds[0], TrainingRecipe):
        shown = {name: field for name, field in shown.items() if name not in fields(TrainingRecipe)}
    rows = [["field", *columns, "meaning"], ["---"] * (len(columns) + 2)]
    types = get_type_hints(kinds[0])
    rows += [
        [name, *(default(fields(kind)[name]) for kind in kinds), meaning(said[name], types[name])] for name in shown
    ]
    return written(rows)


def written(rows: list[list[str]]) -> str:
    """Returns rows of cells as Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def request_table() -> str:
    """Returns the table of the fields of requests that have a meaning."""
    rows = [["field", "of", "default", "meaning"], ["---"] * 4]
    names = dict.fromkeys(name for kind in ENDPOINTS for name in kind.model_fields)  # type: ignore[attr-defined]
    for name in names:
        found = {kind: kind.model_fields[name] for kind in ENDPOINTS if name in kind.model_fields}  # type: ignore[attr-defined]
        found = {kind: field for kind, field in found.items() if field.annotation is not type(None)}
        kind, field = next(iter(found.items()))
        of = "all" if len(found) == len(ENDPOINTS) else ", ".join(ENDPOINTS[kind] for kind in found)
        needed = [ENDPOINTS[kind] for kind, field in found.items() if field.is_required()]
        value = "" if field.is_required() or field.default is None else json.dumps(field.default)
        if needed:
            value = "required" if len(needed) == len(found) else f"required for {', '.join(needed)}"
        rows.append([name, of, value, meaning(descriptions(kind)[name], field.annotation)])
    return written(rows)


def unused_table() -> str:
    """Returns the table of the fields of requests that have no effect, or that are refused."""
    rows = [["field", "answer"], ["---"] * 2]
    for answer, reasons in (("no effect", IGNORED), ("400", REFUSED)):
        for reason in dict.fromkeys(reasons.values()):
            fields = ", ".join(f"`{name}`" for name in reasons if reasons[name] == reason)
            rows.append([fields, f"{answer}: {reason}"])
    return written(rows)


def metric_table() -> str:
    """Returns the table of our metrics."""
    rows = [["metric", "claim", "better", "models", "needs"], ["---"] * 5]
    for metric in OURS:
        text = metric.text.replace("{model}", "...")
        rows.append([f"`{metric.name}`", text, metric.better, ", ".join(metric.models), ", ".join(metric.needs)])
    return written(rows)


def report_tables() -> str:
    """Returns a table for each object of report.json."""
    text = ""
    for title, kind in OBJECTS.items():
        said, types = descriptions(kind), get_type_hints(kind)
        rows = [[f"`{name}`", json_type(types[name]), in_json(said[name])] for name in types if name not in ROW_VALUES]
        if kind is Change:
            rows.append(["`verdict`", json_type(str), (inspect.getdoc(Change.verdict) or "").removeprefix("Returns ")])
        lead = inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes:")[0]
        text += f"### {title}\n\n{' '.join(lead.replace('``', '`').split())}\n\n"
        text += written([["field", "type", "meaning"], ["---"] * 3, *rows]) + "\n"
    return text


def in_json(text: str) -> str:
    """Returns an explanation with JSON's words for Python's values."""
    return re.sub(r"\b(?:None|True|False)\b", lambda found: JSON_WORDS[found[0]], text)


def json_type(kind: Any) -> str:
    """Returns what JSON calls a type: "list of strings", "object of integers, or null"."""
    names = {str: "string", bool: "true or false", int: "integer", float: "number", type(None): "null"}
    if kind in names:
        return names[kind]
    parts = [json_type(part) for part in get_args(kind) if part is not ...]
    if get_origin(kind) in (list, tuple):
        return f"list of {parts[0]}s"
    if get_origin(kind) is dict:
        return "object" if get_args(kind)[1] is Any else f"object of {parts[1]}s"
    return ", or ".join(parts) if parts else "object"


REQUESTS = {
    "requests": request_table,
    "other models": unused_table,
    "metrics": metric_table,
    "report.json": report_tables,
}
OBJECTS = {
    "The document": ReportDocument,
    "stages": StageReport,
    "figures": Figure,
    "samples": SampleReport,
    "against": Comparison,
    "against.figures": Change,
}
JSON_WORDS = {"None": "null", "True": "true", "False": "false"}
ROW_VALUES = ("values", "groups")  # of figures, which report.json leaves out


def meaning(text: str, kind: Any) -> str:
    """Returns a description as the cell of a table, after the values that a field may have."""
    values = [f"`{value}`" for value in get_args(kind)] if get_origin(kind) is Literal else []
    if values and not all(value in text for value in values):
        text = f"{', '.join(values[:-1])} or {values[-1]}. {text}"
    phrase = text.removesuffix(".")
    return phrase if ". " not in phrase else text


def schema_text() -> str:
    """Returns the content of pipeline/schema.json."""
    return json.dumps(schema(STAGES), indent=1, sort_keys=True) + "\n"


def main() -> int:
    """Writes it."""
    SCHEMA.write_text(schema_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
