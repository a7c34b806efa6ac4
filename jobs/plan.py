"""``unclip plan CONFIG``: what a run would make, why, and what it costs.

Costs come from the last run or from a probe; what nobody has measured is guessed. With ``--pairs`` they are those of a
list of that size that does not exist yet, as if nothing were made.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from types import MappingProxyType
from typing import Any

from jobs.output import print_json, say, warn
from jobs.project import Project, open_project
from pipeline.build import build
from pipeline.config import load_config
from pipeline.cost.devices import parse_fleet
from pipeline.cost.estimate import UTILISATION, Cost, PlanInput, estimate
from pipeline.cost.limits import impossible, lacking
from pipeline.cost.observed import Observations, observe, read_profile
from pipeline.cost.schedule import elapsed
from pipeline.cost.table import cost_table, elapsed_between, places, remarks, said_between, second_prior, size
from pipeline.errors import UserError
from pipeline.graph.plan import Verdict
from pipeline.graph.ray import find_machine
from pipeline.graph.resources import Machine
from pipeline.progress import counted, duration
from pipeline.settings import RaySettings

SHORT = 48  # characters of a reason
LONGEST = 3  # stages that are named


def main(arguments: argparse.Namespace) -> int:
    """Prints the verdict on every stage and what the stale ones cost."""
    utilisation = UTILISATION if arguments.utilisation is None else arguments.utilisation
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation:g}: use a share above 0 and at most 1")
    fleet = parse_fleet(arguments.gpus) if arguments.gpus else None
    rows, project = arguments.pairs, None
    seen: Observations = {}
    if rows == 0:
        raise UserError("--pairs 0: plan for 1 pair or more")
    if rows is None or arguments.probe:
        project = open_project(arguments.config, arguments.overrides)
        project.check_trackers()
        config, graph = project.config, project.graph
        if arguments.probe:
            from jobs.probe import probe

            seen = probe(project, arguments.config, arguments.overrides, warn if arguments.json else say)
        else:
            seen = observe(project.store, config.project, graph, project.held_out)
    else:
        config = load_config(arguments.config, arguments.overrides)
        graph = build(config)
    if arguments.profile:
        seen = seen | read_profile(arguments.profile, graph)
    if rows is not None:
        ask = PlanInput(config, graph, rows, config.source.test, None, seen, fleet, utilisation)
        return _tell_of_size(ask, arguments.json, arguments.verbose)
    assert project is not None
    tabled = any((arguments.probe, arguments.gpus, arguments.profile))
    asked: dict[str, Any] = {"seen": seen, "fleet": fleet, "utilisation": utilisation}
    plan = plan_run(project, verbose=arguments.verbose, tabled=tabled, **asked)
    lacks = [*map(str, lacking(plan.costs, plan.ask, project.store))]
    if arguments.json:
        known = {v.stage: {"state": v.state, "key": v.key, "because": v.because} for v in plan.verdicts}
        shards, warnings = len(project.scan.shards), [*lacks, *project.warnings(plan.costs)]
        print_json(_as_values(plan.ask, plan.costs, shards, warnings, project.store.url, known))
        return 0
    say("\n".join([str(plan), *(f"warning: {lack}" for lack in lacks)]))
    return 0


def _tell_of_size(ask: PlanInput, as_json: bool, verbose: bool) -> int:
    """Prints the costs of a list of some size, as if nothing were made."""
    costs = {stage: estimate(stage, ask) for stage in ask.graph}
    lacks = [*map(str, impossible(costs, ask))]
    if as_json:
        print_json(_as_values(ask, costs, ask.shards, lacks))
        return 0
    where = f" on {ask.fleet.count} {ask.fleet.name}" if ask.fleet else ""
    say(f"{ask.config.project}: {_size(ask.rows, ask.shards)}{where}, as if nothing were made")
    say("\n".join([*_cost_lines(costs, ask, verbose), *(f"warning: {lack}" for lack in lacks)]))
    return 0


def _as_values(
    ask: PlanInput,
    costs: Mapping[str, Cost],
    shards: int,
    warnings: Sequence[str],
    store: str | None = None,
    known: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Returns what a plan says, for JSON. Times are in seconds, ``disk`` in bytes."""
    return {
        "project": ask.config.project,
        "store": store,
        "pairs": ask.rows,
        "shards": shards,
        "seconds": elapsed(costs, ask),
        "between": elapsed_between(costs, ask),
        "warnings": warnings,
        "stages": [{"stage": stage, **known.get(stage, {}), "cost": costs.get(stage)} for stage in ask.graph],
    }


@dataclass(frozen=True, repr=False)
class RunPlan:
    """Holds what a run is to make. As text it is what ``unclip run`` prints before anything is made.

    Attributes:
        project: Project to run.
        wanted: Stages that were asked for, with all that they need.
        verdicts: Verdicts on all stages.
        costs: Estimates of the stale stages; none where the machine to run on is not known here.
        ask: Data of these estimates.
        verbose: True for a text with all costs and every change.
        tabled: True for a text with a table of costs in place of the longest stages.
    """

    project: Project
    wanted: set[str]
    verdicts: list[Verdict]
    costs: dict[str, Cost]
    ask: PlanInput
    verbose: bool = False
    tabled: bool = False

    @property
    def stale(self) -> list[str]:
        """Returns the wanted stages that are stale."""
        return [v.stage for v in self.verdicts if v.state == "stale" and v.stage in self.wanted]

    @property
    def keys(self) -> dict[str, str]:
        """Returns the keys of the wanted stages, by stage."""
        return {verdict.stage: verdict.key for verdict in self.verdicts if verdict.stage in self.wanted}

    @property
    def seconds(self) -> dict[str, float]:
        """Returns what the stale stages are estimated to take, by stage."""
        return {stage: cost.seconds for stage, cost in self.costs.items()}

    def check(self) -> None:
        """Raises UserError for a run above the budget, of days on a CPU, or with too little room on a disk."""
        if lack := next(lacking(self.costs, self.ask, self.project.store), None):
            raise UserError(f"{lack}; add --yes to go on anyway")
        seconds, hours = elapsed(self.costs, self.ask), self.project.config.run.budget_hours
        if seconds > hours * 3600:
            raise UserError(
                f"about {duration(seconds)} is above run.budget_hours {hours:g}; "
                "add --yes to go on, or raise the budget"
            )

    def __repr__(self) -> str:
        shown = [v for v in self.verdicts if v.stage in self.wanted]
        return "\n".join(_plan_lines(self.project, shown, self.costs, self.ask, self.verbose, self.tabled))


def plan_run(
    project: Project,
    only: str | None = None,
    until: str | None = None,
    verbose: bool = False,
    machine_of: Callable[[RaySettings], Machine | None] = find_machine,
    seen: Observations | None = None,
    tabled: bool = False,
    **asked: Any,
) -> RunPlan:
    """Plans a run.

    Args:
        project: Project to plan.
        only: The one stage to make.
        until: The last stage to make.
        verbose: True for a plan whose text has all costs and every change.
        machine_of: Function that finds the machine or cluster to run on, or None where it is not known here: nothing is
            estimated then, and the driver of the job, which knows its cluster, plans again.
        seen: Observations to scale; by default those of the last run.
        tabled: True for a plan whose text has a table of costs.
        asked: GPUs to plan for, and their utilisation, as ``PlanInput`` has them.

    Raises:
        UserError: ``until`` is given beside ``only``, or this lacks an input.
    """
    if only and until:
        raise UserError("--only and --until exclude each other; leave one of them out")
    project.check_trackers()
    wanted = project.wanted(only, until)
    verdicts = project.plan()
    stale = [v.stage for v in verdicts if v.state == "stale" and v.stage in wanted]
    if only and [name for name in stale if name != only]:
        raise UserError(f"--only {only} needs {', '.join(n for n in stale if n != only)} first; use --until {only}")
    machine = machine_of(project.config.run.ray) if stale else None
    if seen is None and stale:  # where there is nothing to do, nothing is read
        seen = observe(project.store, project.config.project, project.graph, project.held_out)
    unread = project.scan.unstored
    ask = PlanInput(project.config, project.graph, project.rows, project.held_out, unread, seen or {}, **asked)
    if machine is None:
        return RunPlan(project, wanted, verdicts, {}, ask, verbose, tabled)
    ask = replace(ask, machine=machine, looked=True)
    return RunPlan(project, wanted, verdicts, {name: estimate(name, ask) for name in stale}, ask, verbose, tabled)


def _plan_lines(
    project: Project,
    verdicts: Sequence[Verdict],
    costs: Mapping[str, Cost],
    ask: PlanInput,
    verbose: bool,
    tabled: bool,
) -> Iterator[str]:
    """Yields a line for each stage, the sum, and on what they run; all costs if ``verbose``."""
    yield f"{project.config.project}: {_size(ask.rows, len(project.scan.shards))}, store {project.store.url}"
    for verdict in verdicts:
        note = verdict.because if verbose else shorten(verdict.because, SHORT, placeholder=" ...")
        if cost := costs.get(verdict.stage):
            note += f", about {duration(cost.seconds)}{' (a guess)' if cost.basis == 'guess' else ''}"
        yield f"  {verdict.stage:16}{verdict.state:8}{verdict.key[:12]}  {note}".rstrip()
    if not costs:
        return
    guessed = any(cost.basis == "guess" for cost in costs.values())
    total, between = duration(elapsed(costs, ask)), said_between(elapsed_between(costs, ask))
    if between:
        total += f" ({between})"
    yield f"about {total} in all{', guessed from sizes where nothing was measured yet' if guessed else ''}"
    yield places(costs, ask)
    yield from (f"warning: {line}" for line in project.warnings(costs))
    if verbose or tabled:
        yield ""
        yield from _cost_lines(costs, ask, verbose)
    else:
        longest = sorted(costs, key=lambda stage: -costs[stage].seconds)[:LONGEST]
        parts = ", ".join(f"{stage} {duration(costs[stage].seconds)}" for stage in longest)
        yield f"most of it: {parts}; {size(sum(cost.disk for cost in costs.values()))} of disk; -v says more"
        yield from second_prior(costs, ask)


def _cost_lines(costs: Mapping[str, Cost], ask: PlanInput, verbose: bool) -> list[str]:
    table = cost_table(costs, elapsed(costs, ask), ask.config.run.prices, elapsed_between(costs, ask))
    return [*table, *remarks(costs, ask, verbose), *([] if verbose else ["-v says what this rests on"])]


def _size(rows: int, shards: int) -> str:
    return f"{counted(rows, 'pair')} in {counted(shards, 'shard')}"


def changes(before: Sequence[Verdict], after: Sequence[Verdict]) -> str:
    """Returns a line for each verdict that has changed."""
    then = {v.stage: (v.key, v.state) for v in before}
    changed = [v for v in after if (v.key, v.state) != then[v.stage]]
    lines = (f"  {v.stage:16}{v.state:8}{v.key[:12]}  {v.because}".rstrip() for v in changed)
    return "\n".join(lines) or "nothing becomes stale"
