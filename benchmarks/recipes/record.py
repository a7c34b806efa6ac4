"""The record of trials: a line of JSON each, and the tables of docs/recipes.md that are made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from pipeline.errors import UserError

LOG = Path(__file__).with_name("log.jsonl")
PAGE = Path(__file__).parents[2] / "docs/recipes.md"
TABLE = re.compile(r"^<!-- trials of (\w+) -->\n\n(?:(?:\|.*\n)+\n)?", re.MULTILINE)
COLUMNS = {  # of the table of each stage: a figure, its heading, its decimals
    "clip": {
        "name_alone": ("name", 2),
        "within_style": ("name in style", 2),
        "other_style_rank": ("rank in the other style", 0),
        "other_style_first_10": ("its first 10", 2),
        "held_out_name_alone": ("held-out name", 2),
        "held_out_within_style": ("held-out name in style", 2),
        "held_out_other_style_rank": ("held-out rank", 0),
    },
    "diffusion_prior": {
        **{f"x0_error_{i}": (f"error {i}", 4) for i in range(1, 5)},
        "embedding_cosine": ("cosine", 3),
        "embedding_first_10": ("first 10", 2),
        "variance_ratio": ("variance", 2),
        "caption_first_10": ("drawn: first 10", 2),
        "caption_background": ("drawn: background", 2),
    },
    "decoder": {
        **{f"x0_error_{i}": (f"error {i}", 4) for i in range(1, 5)},
        "image_first_10": ("first 10, own z", 2),
        "caption_first_10": ("from the caption", 2),
        "held_out_caption_first_10": ("held-out caption", 2),
        "image_cosine": ("cosine, own z", 3),
        "image_background": ("background, own z", 2),
        "caption_background": ("from the caption", 2),
        "image_dots": ("dots, of 1", 4),
    },
}
COLUMNS["ar_prior"] = {"nats": ("nats", 3)} | {
    name: shown for name, shown in COLUMNS["diffusion_prior"].items() if not name.startswith("x0_error")
}


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a record, [] where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line to a record."""
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def check_new(lines: Iterable[Mapping[str, Any]], described: Mapping[str, Any], seed: int) -> None:
    """Raises UserError if the record has another trial of this name, or this one with this seed.

    Args:
        lines: Of the record.
        described: The fields of a trial as plain values, and its partners.
        seed: Of the new run.
    """
    name = described["name"]
    for line in lines:
        if line["name"] != name:
            continue
        if changed := [key for key, value in described.items() if line.get(key) != value]:
            raise UserError(f"{name}: the record has it with another {changed[0]}; give the new trial a new name")
        if line["seed"] == seed:
            raise UserError(f"{name}: the record has it with seed {seed}; take another --seed")


def page(text: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the page with its tables as the record has them."""

    def filled(found: re.Match[str]) -> str:
        rows = table(found[1], lines)
        return f"<!-- trials of {found[1]} -->\n\n{rows}" + "\n" * bool(rows)

    return TABLE.sub(filled, text)


def table(stage: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of a stage: a row a trial, in the order of the record, and the columns that it has."""
    trials: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line["stage"] == stage:
            trials.setdefault(line["name"], []).append(line)
    measured = {name for runs in trials.values() for run in runs for name in run["figures"]}
    shown = {name: heading for name, heading in COLUMNS[stage].items() if name in measured}
    head = ["trial", "hypothesis", "CPU s", "seeds", "samples", *(heading for heading, _ in shown.values())]
    rows = [head, ["---"] * len(head)] if trials else []
    for name, runs in trials.items():
        samples = round(mean(run["samples"] for run in runs))
        about = [f"`{name}`", runs[0]["hypothesis"], f"{runs[0]['seconds']:,.0f}", str(len(runs)), f"{samples:,}"]
        rows.append(about + [cell(runs, figure, digits) for figure, (_, digits) in shown.items()])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(runs: Sequence[Mapping[str, Any]], figure: str, digits: int) -> str:
    """Returns a figure's mean over runs, with its least and most; of one run, with its interval over rows."""
    if any(run["diverged"] for run in runs):
        return "diverged"
    found = [run["figures"][figure] for run in runs if figure in run["figures"]]
    if not found:
        return ""
    values = [value for value, _, _ in found]
    low, high = (min(values), max(values)) if len(found) > 1 else found[0][1:]
    return f"{mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
