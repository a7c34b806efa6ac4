"""Writes what ``unclip show`` prints. Pure: text from what was read, and from the current time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from textwrap import wrap
from typing import Any

from pipeline.build import all_stages
from pipeline.graph.artifacts import Artifact, StageKey
from pipeline.graph.leases import Holder
from pipeline.graph.records import PlannedStage
from pipeline.graph.stages import transitive_reduction
from pipeline.ledger import Ledger
from pipeline.progress import counted, duration
from pipeline.release.pointer import Move
from pipeline.store.records import who
from pipeline.upkeep.overview import Lineage, Overview, PastRun

WIDTH = 110
SHORT = 12  # characters of a key
UNBROKEN = "\0"  # stands for a space while lines are wrapped, so that none ends there


def show_overview(found: Overview, now: float) -> str:
    """Returns the last runs, what is being made, and of each project its last run's stages, pins and release."""
    lines = [f"store {found.url}", "", "running now" if found.leases else "running now: nothing"]
    for key, lease in sorted(found.leases.items(), key=lambda item: item[1].since):
        lines += _running(key, lease, now)
    if not found.runs:
        return "\n".join([*lines, "", "no runs yet"])
    earlier = found.all_runs - len(found.runs)
    lines += ["", "last runs" + (f" (and {earlier:,} before)" if earlier > 0 else "")]
    size = max(len(run.project) for run in found.runs)
    for run in found.runs:
        made = sum((stage, run.stages[stage].key) in found.made for stage in run.wanted)
        what = f"{made} of {len(run.wanted)} stages made by now"
        lines.append(f"  {_date(run.at)}  {run.project:{size}}  {what}  {_asked_by(run)}".rstrip())
    for project in dict.fromkeys(run.project for run in found.runs):
        lines += ["", project, *_project(next(run for run in found.runs if run.project == project), found, now)]
    return "\n".join(lines)


def _running(key: str, lease: Holder, now: float) -> Iterator[str]:
    began = f"since {_date(lease.since)} ({duration(max(0, now - lease.since))})"
    silent = max(0, now - (lease.since if lease.at is None else lease.at))
    heard = "not heard of for {}: probably ended" if silent > lease.lease_s else "heard of {} ago"
    who_does = f"{lease.stage} {key[:SHORT]} by {lease.name}, pid {lease.pid}"
    yield f"  {who_does}, {began}, {heard.format(duration(silent))}"
    if lease.progress:
        yield f"    {lease.progress}"


def _asked_by(run: PastRun) -> str:
    return "  ".join(word for word in (who(run.by), run.by.get("command", "")) if word)


def _project(run: PastRun, found: Overview, now: float) -> Iterator[str]:
    order = {stage.name: place for place, stage in enumerate(all_stages())}
    stages = sorted(run.stages, key=lambda stage: (order.get(stage, len(order)), _depth(stage, run.stages), stage))
    names = [(stage, run.stages[stage].key) for stage in stages]
    states: dict[str, list[StageKey]] = {"made": [], "being made": [], "not made": []}
    for name in names:
        state = "made" if name in found.made else "being made" if name[1] in found.leases else "not made"
        states[state].append(name)
    states["pinned"] = [name for name in names if name[1] in found.pinned]
    for state, those in states.items():
        yield from _listed(state, (f"{stage} {key[:SHORT]}" for stage, key in those))
    release = found.releases.get(run.project)
    if isinstance(release, Move):
        yield from _listed("release", [f"{release.bundle[:SHORT]} since {_date(release.at)} ({_ago(release.at, now)})"])
    elif release:
        yield from _listed("release", [release])


def _depth(stage: str, stages: Mapping[str, PlannedStage]) -> int:
    """Returns how many stages are behind one, along the longest way."""
    return max((1 + _depth(name, stages) for name in stages[stage].inputs if name in stages), default=0)


def show_lineage(found: Lineage, defaults: Mapping[str, Any], now: float) -> str:
    """Returns when, where and of what an artefact was made, and its users. ``defaults``: of its recipe."""
    made = found.artifact
    kept_by = [f"release of {project}" for project in found.released] + ["pin"] * found.pinned
    lines = [f"{made.stage} {made.key}, version {made.version}"]
    at, took = made.times["finished"], duration(made.times["seconds"])
    lines += _listed("made", [f"{_date(at)} ({_ago(at, now)}), in {took}"])
    lines += _listed("where", _where(made))
    lines += _listed("rows", _rows(made.ledger))
    lines += _listed("recipe", _changed(made.recipe, defaults) or ["as the defaults are"])
    lines += _listed("kept by", kept_by)
    if made.inputs:
        lines += ["", "made from", *_tree(found, now)]
    users = (f"{stage} {key[:SHORT]} ({_age(user, now)})" for (stage, key), user in _nearest(found.users).items())
    lines += ["", *_listed("used by", users)] if found.users else []
    return "\n".join(lines)


def _where(made: Artifact) -> Iterator[str]:
    told = made.environment
    if by := who(made.by):
        yield by
    for name in ("device", "precision"):
        if name in told:
            yield told[name]
    if workers := int(made.times.get("workers", told.get("workers", 0))):
        yield counted(workers, "worker")
    for name in ("python", "torch", "ray"):
        if name in told:
            yield f"{name} {told[name]}"


def _rows(ledger: Ledger) -> Iterator[str]:
    if ledger.rows:
        yield f"{ledger.kept:,} kept"
    for end, reasons in (("rejected", ledger.rejected), ("deferred", ledger.deferred)):
        if reasons:
            most = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
            why = ", ".join(f"{count:,} {reason}" for reason, count in most)
            yield f"{sum(reasons.values()):,} {end} ({why})"


def _changed(recipe: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    changed = {n: v for n, v in sorted(recipe.items()) if n not in defaults or defaults[n] != v}
    return [f"{name} {value}" for name, value in changed.items()]


def _tree(found: Lineage, now: float) -> Iterator[str]:
    """Yields every input below its user, with its own inputs only the first time."""
    root = (found.artifact.stage, found.artifact.key)
    loaded: dict[StageKey, Artifact | None] = {root: found.artifact, **found.behind}
    inputs = transitive_reduction({name: list(made.inputs.items()) if made else [] for name, made in loaded.items()})
    seen = set()

    def below(name: StageKey, depth: int) -> Iterator[str]:
        for child in inputs[name]:
            again = child in seen and bool(inputs[child])
            seen.add(child)
            age = "see above" if again else _age(loaded[child], now)
            yield f"{'  ' * depth}{child[0]} {child[1][:SHORT]}  {age}"
            if not again:
                yield from below(child, depth + 1)

    yield from below(root, 1)


def _nearest(users: Mapping[StageKey, Artifact]) -> dict[StageKey, Artifact]:
    """Returns users that do not also use another of them."""
    return {name: made for name, made in users.items() if not made.inputs.items() & users.keys()}


def _age(made: Artifact | None, now: float) -> str:
    return "no longer there" if made is None else _ago(made.times["finished"], now)


def _listed(title: str, words: Iterable[str]) -> list[str]:
    """Returns words wrapped behind a title, no word broken; nothing for no words."""
    text = ", ".join(word.replace(" ", UNBROKEN) for word in words)
    lines = wrap(text, WIDTH, initial_indent=f"  {title:12}", subsequent_indent=" " * 14, break_long_words=False)
    return [line.replace(UNBROKEN, " ") for line in lines]


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))


def _ago(at: float, now: float) -> str:
    seconds = max(0.0, now - at)
    return f"{duration(seconds)} ago" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days ago"
