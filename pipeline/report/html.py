"""Renders the templates of the report. Every value that they show becomes one escaped line of bounded length."""

from __future__ import annotations

import logging
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.progress import duration

log = logging.getLogger("unclip")

LONGEST = 400  # characters of one value
FACTS_SHOWN = 60


def text(value: Any, limit: int = LONGEST) -> str:
    """Returns a value as one line of at most ``limit`` characters, without control characters."""
    line = str(value)[: 4 * limit]  # first, so that a value of megabytes costs no time
    line = " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in line).split())
    if len(line) > limit or len(str(value)) > 4 * limit:
        line = line[: limit - 1].rstrip() + "…"
    return line


def number(value: Any) -> str:
    """Formats a number for reading, such as 41,216, 0.0123 or 1.2e-05; any other value as ``text`` does."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"


def plain(value: Any) -> str:
    """Formats a JSON value for reading; of a long list the first eight entries."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        more = f", … ({len(value)} in all)" if len(value) > 8 else ""
        return ", ".join(number(v) for v in value[:8]) + more
    return number(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Merges nested mappings into one, with dotted names."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return result


def template(name: str, **names: Any) -> Any:
    """Returns a template whose macros can be called as functions and know these ``names``; each returns Markup."""
    return ENVIRONMENT.get_template(name, globals=names).module


def facts(values: Mapping[str, Any]) -> Markup:
    """Returns a table of names and values, nested ones by dotted name."""
    entries = list(flat(values).items())
    return PARTS.facts(entries[:FACTS_SHOWN], len(entries) - FACTS_SHOWN)


def note(message: str) -> Markup:
    """Returns one quiet line."""
    return PARTS.note(message)


class Section(Markup):
    """A section of the page; the contents link to its ``id`` by its ``heading``."""

    id: str
    heading: str

    @classmethod
    def of(cls, macro: Callable[..., Markup], id: str, heading: str, *arguments: Any) -> Section:
        """Returns what a macro makes of them all."""
        section = cls(macro(id, heading, *arguments))
        section.id, section.heading = id, heading
        return section


def attempt(what: str, make: Callable[..., Markup], *arguments: Any, otherwise: Sequence[Markup] = ()) -> Markup:
    """Returns what ``make`` returns for ``arguments``, or one line that says why ``what`` is not shown.

    After that line stands what is shown ``otherwise``. Catches every exception: a report must never stop a run,
    whatever it meets in a store.
    """
    try:
        return make(*arguments)
    except Exception as e:
        log.info("report: %s cannot be shown", what, exc_info=True)
        return note(f"{what} cannot be shown: {e or type(e).__name__}") + Markup().join(otherwise)


def _cleaned(value: Any) -> Any:
    # Every value that a template prints comes here first. What has __html__ is a piece of the page already.
    return value if hasattr(value, "__html__") else text(value)


ENVIRONMENT = Environment(
    loader=PackageLoader("pipeline.report"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_cleaned,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"text": text, "number": number, "plain": plain, "duration": duration, "at": "{:.1f}".format}
PARTS = template("parts.html")
