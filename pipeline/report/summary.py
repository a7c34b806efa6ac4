"""Summarises a run: one sentence, and four tiles that lead to the sections."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from models.sampling_config import PRIORS
from pipeline.config import Config
from pipeline.evaluate.figure import by_claim, count, holds
from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Graph
from pipeline.progress import counted, duration
from pipeline.report.html import template
from pipeline.report.lineage import worker_hours
from pipeline.report.rows import LISTED, lost_rows
from pipeline.report.training import training_so_far

HEAD = template("head.html")


class Tile(NamedTuple):
    """A tile: title, value, the line below, the section that it links to, and the parts of its meter."""

    title: str
    value: str
    said: str
    section: str = ""
    parts: tuple[tuple[str, float], ...] = ()


def head(config: Config, graph: Graph, artifacts: Mapping[str, Artifact], running: Sequence[Artifact]) -> Markup:
    """Shows the sentence and the tiles; the stages, too, while there are any to come."""
    names = [*graph, *sorted(artifacts.keys() - set(graph))]
    chain = [(name, name in artifacts) for name in names]
    said = verdict(graph, artifacts, running)
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    tiles = [
        _tile("Images", "samples", artifacts, _images),
        _tile("Quality", "evaluation", artifacts, _quality),
        _tile("Data", "source", artifacts, _data),
        _tile("Cost", "", artifacts, _cost),
    ]
    return HEAD.head(config.project, said, when, tiles, [] if all(done for _, done in chain) else chain)


def verdict(graph: Graph, artifacts: Mapping[str, Artifact], running: Sequence[Artifact] = ()) -> str:
    """Returns one sentence: what is done, or what an evaluation found."""
    names = [*graph, *sorted(artifacts.keys() - set(graph))]
    todo = [name for name in graph if name not in artifacts]
    done = f"{len(names) - len(todo)} of {len(names)} stages are done"
    if todo:
        trained = [f"{each.stage} is being trained: {training_so_far(each)}" for each in running]
        return "; ".join([done, *(trained or [f"next is {todo[0]}"])]) + "."
    if "evaluation" not in artifacts:
        return f"{done}; nothing of them measures quality."
    figures = artifacts["evaluation"].metrics["figures"]
    held = count(figures)
    failing = list(dict.fromkeys(figure["model"] for figure in figures if figure["holds"] is False))
    if not failing:
        return f"{held}."
    unused = ", which drew none of these images" if failing == [_other_prior(artifacts)] else ""
    return f"{held}; the others are about {_listed(failing)}{unused}."


def _other_prior(artifacts: Mapping[str, Artifact]) -> str | None:
    """Returns the prior that the samples were drawn without."""
    settings = artifacts["samples"].metrics.get("settings") if "samples" in artifacts else None
    used = settings.get("prior") if isinstance(settings, Mapping) else None
    return next((model for name, model in PRIORS.items() if name != used), None) if used in PRIORS else None


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _tile(
    title: str, stage: str, artifacts: Mapping[str, Artifact], make: Callable[[Mapping[str, Artifact]], Tile]
) -> Tile:
    """Returns a tile, or one that says why there is nothing in it: a report must never stop a run."""
    if stage and stage not in artifacts:
        return Tile(title, "–", "not made yet")
    try:
        return make(artifacts)
    except Exception as e:
        return Tile(title, "–", f"cannot be shown: {e or type(e).__name__}")


def _images(artifacts: Mapping[str, Artifact]) -> Tile:
    made = artifacts["samples"]
    settings = made.metrics["settings"]
    size = f" at {settings['size']:,} px" if "size" in settings else ""
    prior = f"from captions, with {PRIORS.get(settings['prior'], settings['prior'])}"
    best = f"; best of {settings['candidates']} each" if settings.get("candidates", 1) > 1 else ""
    return Tile("Images", f"{made.ledger.kept:,}{size}", prior + best, "samples")


def _quality(artifacts: Mapping[str, Artifact]) -> Tile:
    found = [holds(of_claim) for of_claim in by_claim(artifacts["evaluation"].metrics["figures"])]
    held, fails, unknown = (found.count(value) for value in (True, False, None))
    said = ", ".join(f"{n} {what}" for n, what in ((fails, "do not hold"), (unknown, "not measured")) if n)
    parts = (("good", held), ("bad", fails), ("rest", unknown))
    value = f"{held} of {held + fails} claims hold" if held + fails else "not measured"
    return Tile("Quality", value, said or "all that were measured", "evaluation", _shares(parts))


def _data(artifacts: Mapping[str, Artifact]) -> Tile:
    listed = {name: artifacts[name] for name in LISTED if name in artifacts}
    rows, kept = listed["source"].ledger.rows, list(listed.values())[-1].ledger.kept
    lost = Counter[str]()
    for each in lost_rows(listed):
        lost[each.reason] += each.number
    said = ", ".join(f"{count:,} {reason}" for reason, count in lost.most_common(2))
    more = "" if len(lost) < 3 else f", {len(lost) - 2} reasons more"
    parts = (("good", kept), ("bad", rows - kept))
    value = f"{kept:,} of {counted(rows, 'row')}"
    return Tile("Data", value, f"kept; lost: {said}{more}" if lost else "kept", "data", _shares(parts))


def _cost(artifacts: Mapping[str, Artifact]) -> Tile:
    took = {name: made.times["seconds"] for name, made in artifacts.items() if "seconds" in made.times}
    if not took:
        return Tile("Cost", "–", "nothing is made yet")
    hours = sum(worker_hours(artifacts[name]) for name in took)
    longest = max(took, key=lambda name: took[name])
    said = f"{hours:.2f} worker hours; longest: {longest}, {duration(took[longest])}"
    return Tile("Cost", duration(sum(took.values())), said, "lineage")


def _shares(parts: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    whole = sum(count for _, count in parts) or 1
    return tuple((kind, count / whole * 100) for kind, count in parts if count)
