"""``unclip plan CONFIG``: what a run would make, why, and what it costs.

Costs come from the last run or from a probe; what nobody has measured is guessed. With ``--pairs`` they are those of a
list of that size that does not exist yet, as if nothing were made.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jobs.probe import probe
from jobs.project import Project, open_project
from pipeline.build import build
from pipeline.config import load_config
from pipeline.cost.estimate import UTILISATION, Ask, Cost, estimate, parse_fleet
from pipeline.cost.observed import Seen, observe, read_profile
from pipeline.cost.places import places, too_slow
from pipeline.cost.table import cost_table, remarks
from pipeline.errors import UserError
from pipeline.graph.plan import Verdict
from pipeline.graph.ray import find_machine
from pipeline.graph.resources import Machine
from pipeline.held_out import short_splits
from pipeline.progress import counted, duration
from pipeline.settings import RaySettings


def main(arguments: argparse.Namespace) -> int:
    """Prints the verdict on every stage and what the stale ones cost."""
    utilisation = UTILISATION if arguments.utilisation is None else arguments.utilisation
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation:g}: use a share above 0 and at most 1")
    fleet = parse_fleet(arguments.gpus) if arguments.gpus else None
    rows = arguments.pairs
    if rows == 0:
        raise UserError("--pairs 0: plan for 1 pair or more")
    seen: Seen = {}
    if rows is None or arguments.probe:
        project = open_project(arguments.config, arguments.overrides)
        project.check_trackers()
        config, graph = project.config, project.graph
        if arguments.probe:
            seen = probe(project, arguments.config, arguments.overrides)
        else:
            seen = observe(project.store, config.project, graph, project.held_out)
    else:
        config = load_config(arguments.config, arguments.overrides)
        graph = build(config)
    if arguments.profile:
        seen = seen | read_profile(arguments.profile, graph)
    if rows is None:
        verdicts = project.plan()
        ask = Ask(config, graph, project.rows, project.held_out, seen, fleet, utilisation)
        if any(verdict.state == "stale" for verdict in verdicts):
            ask = replace(ask, machine=find_machine(config.run.ray))
        costs = _print_verdicts(project, verdicts, set(graph), ask)
        if costs:
            print()
    else:
        ask = Ask(config, graph, rows, config.source.test, seen, fleet, utilisation)
        where = f" on {fleet.count} {fleet.name}" if fleet else ""
        print(f"{config.project}: {_size(rows, ask.shards)}{where}, as if nothing were made")
        costs = {stage: estimate(stage, ask) for stage in graph}
    if costs:
        for line in (*cost_table(costs, config.run.prices), *remarks(costs, ask)):
            print(line)
    return 0


@dataclass(frozen=True)
class Agreed:
    """The stages that are wanted, the verdicts on all stages, and which of the wanted ones are stale."""

    wanted: set[str]
    verdicts: list[Verdict]
    stale: list[str]

    @property
    def keys(self) -> dict[str, str]:
        """Returns the keys of the wanted stages, by stage."""
        return {verdict.stage: verdict.key for verdict in self.verdicts if verdict.stage in self.wanted}


def agree(
    project: Project,
    only: str | None,
    until: str | None,
    yes: bool,
    machine_of: Callable[[RaySettings], Machine | None] = find_machine,
) -> Agreed:
    """Plans, prints the plan, and returns what is to be made.

    Args:
        project: What is planned.
        only: The one stage to make.
        until: The last stage to make.
        yes: Go on whatever it costs.
        machine_of: Finds what there is to run on; None where that is not known here.

    Raises:
        UserError: ``only`` lacks an input. Without ``yes``: it costs more than the budget, or a CPU would take more
            than a day for what a GPU can do.
    """
    project.check_trackers()
    wanted = project.wanted(only, until)
    verdicts = project.plan()
    stale = [v.stage for v in verdicts if v.state == "stale" and v.stage in wanted]
    if only and [name for name in stale if name != only]:
        raise UserError(f"--only {only} needs {', '.join(n for n in stale if n != only)} first; use --until {only}")
    machine = machine_of(project.config.run.ray) if stale else None
    # Where there is nothing to do, nothing is read.
    seen = observe(project.store, project.config.project, project.graph, project.held_out) if stale else {}
    ask = Ask(project.config, project.graph, project.rows, project.held_out, seen)
    ask = replace(ask, machine=machine) if machine else ask
    costs = _print_verdicts(project, verdicts, wanted, ask, told=machine is not None)
    seconds = sum(cost.seconds for cost in costs.values())
    if stale and seconds > project.config.run.budget_hours * 3600 and not yes:
        raise UserError(
            f"about {duration(seconds)} is above run.budget_hours {project.config.run.budget_hours:g}; "
            "add --yes to go on, or raise the budget"
        )
    if machine and not yes and (slow := list(too_slow(costs, ask))):
        raise UserError(
            f"{'; '.join(slow)}, for want of a GPU: run it where there are GPUs, or take a smaller preset; add --yes "
            "to go on all the same"
        )
    return Agreed(wanted, verdicts, stale)


def _print_verdicts(
    project: Project, verdicts: Sequence[Verdict], wanted: set[str], ask: Ask, told: bool = True
) -> dict[str, Cost]:
    """Prints one line a stage, and if it is ``told`` on what they run; returns the costs of all stale ones."""
    shards = len(project.scan.shards)
    print(f"{project.config.project}: {_size(ask.rows, shards)}, store {project.store.url}")
    costs: dict[str, Cost] = {}
    for verdict in verdicts:
        if verdict.stage not in wanted:
            continue
        note = verdict.because
        if verdict.state == "stale":
            cost = costs[verdict.stage] = estimate(verdict.stage, ask)
            note += f", about {duration(cost.seconds)}{' (a guess)' if cost.basis == 'guess' else ''}"
        print(f"  {verdict.stage:16}{verdict.state:8}{verdict.key[:12]}  {note}".rstrip())
    if costs:
        guessed = any(cost.basis == "guess" for cost in costs.values())
        total = duration(sum(cost.seconds for cost in costs.values()))
        print(f"about {total} in all{', guessed from sizes where nothing was measured yet' if guessed else ''}")
        if told:
            print(places(costs, ask))
    if "evaluation" in costs:
        for line in short_splits(project.scan.held_out):
            print(f"warning: {line}")
    return costs


def _size(rows: int, shards: int) -> str:
    return f"{counted(rows, 'pair')} in {counted(shards, 'shard')}"


def print_changes(before: Sequence[Verdict], after: Sequence[Verdict]) -> None:
    """Prints the verdicts that have changed."""
    then = {v.stage: (v.key, v.state) for v in before}
    changed = [v for v in after if (v.key, v.state) != then[v.stage]]
    for verdict in changed:
        print(f"  {verdict.stage:16}{verdict.state:8}{verdict.key[:12]}  {verdict.because}".rstrip())
    if not changed:
        print("nothing becomes stale")
