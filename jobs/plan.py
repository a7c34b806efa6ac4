"""``unclip plan CONFIG``: what a run would make, why, and what it costs.

Costs come from the last run or from a probe; what nobody has measured is guessed. With ``--pairs`` they are those of a
list of that size that does not exist yet, as if nothing were made.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.probe import probe
from jobs.project import Project, add_config, open_project
from pipeline.build import build
from pipeline.config import load_config
from pipeline.cost.estimate import UTILISATION, Ask, Cost, estimate, parse_count, parse_fleet
from pipeline.cost.observed import Seen, observe, read_profile
from pipeline.cost.table import cost_table, remarks
from pipeline.errors import UserError
from pipeline.graph.plan import Verdict
from pipeline.held_out import short_splits
from pipeline.progress import counted, duration


def main(argv: Sequence[str]) -> int:
    """Prints the verdict on every stage and what the stale ones cost."""
    parser = argparse.ArgumentParser(prog="unclip plan", description=(__doc__ or "").partition("\n")[0])
    add_config(parser)
    parser.add_argument(
        "--probe", action="store_true", help="measure first, on this machine, with few rows and samples"
    )
    parser.add_argument(
        "--pairs", metavar="N", help="plan for a list of that size, such as 650M, as if nothing were made"
    )
    parser.add_argument("--gpus", metavar="NxKIND", help="plan trainings and embeddings on GPUs, such as 64xH100")
    parser.add_argument(
        "--utilisation",
        type=float,
        default=UTILISATION,
        metavar="SHARE",
        help=f"of a GPU's bf16 peak that trainings reach where no GPU was measured ({UTILISATION})",
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="take what make gpu-check measured of the same models"
    )
    arguments = parser.parse_intermixed_args(argv)
    if not 0 < arguments.utilisation <= 1:
        raise UserError(f"--utilisation {arguments.utilisation:g}: use a share above 0 and at most 1")
    fleet = parse_fleet(arguments.gpus) if arguments.gpus else None
    rows = parse_count(arguments.pairs) if arguments.pairs else None
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
        seen = read_profile(arguments.profile, graph) | seen
    if rows is None:
        ask = Ask(config, graph, project.rows, project.held_out, seen, fleet, arguments.utilisation)
        costs = _print_verdicts(project, project.plan(), set(graph), ask)
        if costs:
            print()
    else:
        ask = Ask(config, graph, rows, config.source.test, seen, fleet, arguments.utilisation)
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


def agree(project: Project, only: str | None, until: str | None, yes: bool) -> Agreed:
    """Plans, prints the plan, and returns what is to be made.

    Raises UserError if it costs more than the budget and ``yes`` is not given, or if ``only`` lacks an input.
    """
    project.check_trackers()
    wanted = project.wanted(only, until)
    verdicts = project.plan()
    stale = [v.stage for v in verdicts if v.state == "stale" and v.stage in wanted]
    if only and [name for name in stale if name != only]:
        raise UserError(f"--only {only} needs {', '.join(n for n in stale if n != only)} first; use --until {only}")
    seconds = print_plan(project, verdicts, wanted)
    if stale and seconds > project.config.run.budget_hours * 3600 and not yes:
        raise UserError(
            f"about {duration(seconds)} is above run.budget_hours {project.config.run.budget_hours:g}; "
            "add --yes to go on, or raise the budget"
        )
    return Agreed(wanted, verdicts, stale)


def print_plan(project: Project, verdicts: Sequence[Verdict], wanted: set[str]) -> float:
    """Prints one line a stage; returns the estimated seconds of all stale ones."""
    stale = any(verdict.state == "stale" and verdict.stage in wanted for verdict in verdicts)
    # Where there is nothing to do, nothing is read.
    seen = observe(project.store, project.config.project, project.graph, project.held_out) if stale else {}
    ask = Ask(project.config, project.graph, project.rows, project.held_out, seen)
    return sum(cost.seconds for cost in _print_verdicts(project, verdicts, wanted, ask).values())


def _print_verdicts(project: Project, verdicts: Sequence[Verdict], wanted: set[str], ask: Ask) -> dict[str, Cost]:
    """Prints one line a stage; returns the costs of all stale ones."""
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
