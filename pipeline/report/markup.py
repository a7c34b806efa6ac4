"""Small pieces of HTML. Text that is not our own goes through ``text``, which shortens and escapes it."""

from __future__ import annotations

import html
import logging
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

log = logging.getLogger("unclip")


def text(value: Any, limit: int = 160) -> str:
    """A value as one escaped line of at most ``limit`` characters, without control characters."""
    line = str(value)[: 4 * limit]
    line = " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in line).split())
    if len(line) > limit or len(str(value)) > 4 * limit:
        line = line[: limit - 1].rstrip() + "…"
    return html.escape(line)


def number(value: float) -> str:
    """A number for reading: 41,216, 0.0123 or 1.2e-05."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"


def plain(value: Any) -> str:
    """A JSON value as escaped text; of a long list, the first eight."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        more = f", … ({len(value)} in all)" if len(value) > 8 else ""
        return ", ".join(number(v) for v in value[:8]) + more
    return number(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return result


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table of cells that are escaped already; the columns in ``numeric`` are aligned to the right."""
    kind = ['class="n"' if i in numeric else "" for i in range(len(head))]
    # An empty heading is no heading to those who have the page read to them.
    top = "".join(
        f'<th scope="col" {k}>{name}</th>' if name else f"<td {k}></td>" for name, k in zip(head, kind, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f"<td {k}>{cell}</td>" for cell, k in zip(row, kind, strict=True)) + "</tr>\n" for row in rows
    )
    inner = f"<thead><tr>{top}</tr></thead><tbody>\n{body}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{inner}</table></div>\n'


def facts(values: Mapping[str, Any], limit: int = 60) -> str:
    """A table of names and values, nested ones by dotted name; the first ``limit`` of them."""
    entries = list(flat(values).items())
    rows = [(text(name, 60), f"<bdi>{plain(value)}</bdi>") for name, value in entries[:limit]]
    more = note(f"{len(entries) - limit} more are left out.") if len(entries) > limit else ""
    return table(("name", "value"), rows) + more


def section(anchor: str, title: str, look: str, *parts: str) -> str:
    """A section: its title, a sentence that tells what to look for, and its parts."""
    return f'<section id="{anchor}">\n<h2>{title}</h2>\n<p class="look">{look}</p>\n{"".join(parts)}</section>\n'


def note(message: str) -> str:
    """One quiet line. The message is escaped."""
    return f'<p class="note">{text(message, 300)}</p>\n'


def figure(body: str, caption: str) -> str:
    """A figure with a caption that is escaped already."""
    return f"<figure>\n{body}\n<figcaption>{caption}</figcaption>\n</figure>\n"


def beside(chart: str, numbers: str) -> str:
    """A chart with its numbers to the right, or below on a narrow page."""
    return f'<div class="beside">\n<div>{chart}</div>\n<div>{numbers}</div>\n</div>\n'


def attempt(what: str, make: Callable[..., str], *arguments: Any) -> str:
    """What ``make`` returns for ``arguments``, or one line that says why ``what`` is not shown.

    Catches every exception: a report must never stop a run, whatever it meets in a store.
    """
    try:
        return make(*arguments)
    except Exception as e:
        log.info("report: %s cannot be shown", what, exc_info=True)
        return note(f"{what} cannot be shown: {e or type(e).__name__}")
