"""``unclip plan CONFIG``: what a run would make, why, and about what it costs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.project import Project, open_project
from pipeline.config import OVERRIDES
from pipeline.cost import Cost, estimate
from pipeline.errors import UserError
from pipeline.graph import Verdict
from pipeline.progress import counted, duration


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="unclip plan", description=__doc__)
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    arguments = parser.parse_intermixed_args(argv)
    project = open_project(arguments.config, arguments.overrides)
    project.check_trackers()
    verdicts = project.plan()
    print_plan(project, verdicts, set(project.graph))
    return 0


@dataclass(frozen=True)
class Agreed:
    """What is to be made: ``stale`` of the ``wanted`` stages."""

    wanted: set[str]
    verdicts: list[Verdict]
    stale: list[str]

    @property
    def keys(self) -> dict[str, str]:
        """The keys of what is wanted, by stage."""
        return {verdict.stage: verdict.key for verdict in self.verdicts if verdict.stage in self.wanted}


def agree(project: Project, only: str | None, until: str | None, yes: bool) -> Agreed:
    """Plan, print the plan, and ask where it costs more than the budget, which ``yes`` has answered.

    Raises UserError if it is not answered, or if ``only`` lacks an input.
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
    """Print one line a stage; return the estimated seconds of all stale ones."""
    total = 0.0
    guessed = False
    rows = sum(shard.ledger.kept for shard in project.scan.shards)
    size = f"{counted(rows, 'pair')} in {counted(len(project.scan.shards), 'shard')}"
    print(f"{project.config.project}: {size}, store {project.store.url}")
    for verdict in verdicts:
        if verdict.stage not in wanted:
            continue
        note = verdict.because
        if verdict.state == "stale":
            cost: Cost = estimate(project.graph[verdict.stage], rows, project.config.project, project.store)
            total += cost.seconds
            guessed = guessed or not cost.measured
            note += f", about {duration(cost.seconds)}{'' if cost.measured else ' (a guess)'}"
        print(f"  {verdict.stage:16}{verdict.state:8}{verdict.key[:12]}  {note}".rstrip())
    if total:
        print(
            f"about {duration(total)} in all{', guessed from sizes where nothing was measured yet' if guessed else ''}"
        )
    return total


def print_changes(before: Sequence[Verdict], after: Sequence[Verdict]) -> None:
    """Print the verdicts that are others now."""
    then = {v.stage: (v.key, v.state) for v in before}
    changed = [v for v in after if (v.key, v.state) != then[v.stage]]
    for verdict in changed:
        print(f"  {verdict.stage:16}{verdict.state:8}{verdict.key[:12]}  {verdict.because}".rstrip())
    if not changed:
        print("nothing becomes stale")


if __name__ == "__main__":
    import sys

    from jobs.cli import guard

    sys.exit(guard(main, sys.argv[1:]))
