"""``unclip plan CONFIG``: what a run would make, why, and what it costs.

Costs come from the last run, from a profile that was saved, or from a probe; what nobody has measured is guessed. With
``--pairs`` they are those of a list of that size that is not there yet, as if nothing were made.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.project import Project, open_project
from pipeline.build import build
from pipeline.config import OVERRIDES, load_config
from pipeline.cost.bill import remarks, table
from pipeline.cost.estimate import UTILISATION, Ask, Cost, estimate
from pipeline.cost.fleet import parse_count, parse_fleet
from pipeline.cost.profile import Profile, load_profile, observe
from pipeline.errors import UserError
from pipeline.graph.plan import Verdict
from pipeline.held_out import lacking
from pipeline.progress import counted, duration


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="unclip plan", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument(
        "--probe", action="store_true", help="measure first, on this machine, with few rows and samples"
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="measurements that were saved, for the last run's")
    parser.add_argument("--save-profile", type=Path, metavar="FILE", help="save the measurements that are used")
    parser.add_argument(
        "--pairs", metavar="N", help="plan for a list of so many, such as 650M, as if nothing were made"
    )
    parser.add_argument("--gpus", metavar="NxKIND", help="plan trainings and embeddings on GPUs, such as 64xH100")
    parser.add_argument(
        "--utilisation",
        type=float,
        default=UTILISATION,
        metavar="SHARE",
        help=f"of a GPU's bf16 peak that trainings reach where no GPU was measured ({UTILISATION})",
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.probe and (arguments.pairs or arguments.profile):
        parser.error("--probe measures for itself: save it with --save-profile, then plan with --profile")
    if not 0 < arguments.utilisation <= 1:
        raise UserError(f"--utilisation {arguments.utilisation:g}: use a share above 0 and at most 1")
    fleet = parse_fleet(arguments.gpus) if arguments.gpus else None
    profile = load_profile(arguments.profile) if arguments.profile else None
    if arguments.pairs:
        config = load_config(arguments.config, arguments.overrides)
        ask = Ask(config, parse_count(arguments.pairs), profile or Profile(), fleet, arguments.utilisation)
        where = f" on {fleet.count} {fleet.name}" if fleet else ""
        print(f"{config.project}: {_size(ask.rows, ask.shards)}{where}, as if nothing were made")
        _print_costs({stage: estimate(stage, ask) for stage in build(config)}, ask)
    else:
        project = open_project(arguments.config, arguments.overrides)
        project.check_trackers()
        if arguments.probe:
            from jobs.probe import probe

            profile = probe(project, arguments.config, arguments.overrides)
        ask = ask_of(project, profile, fleet, arguments.utilisation)
        costs = _print_verdicts(project, project.plan(), set(project.graph), ask)
        if costs:
            print()
            _print_costs(costs, ask)
    if arguments.save_profile:
        ask.profile.save(arguments.save_profile)
        print(f"profile: {arguments.save_profile}")
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


def ask_of(project: Project, profile: Profile | None = None, *fleet: object) -> Ask:
    """The costs of a project's own list, by default from what its last run took."""
    rows = sum(shard.ledger.kept for shard in project.scan.shards)
    found = observe(project.store, project.config.project) if profile is None else profile
    return Ask(project.config, rows, found, *fleet)  # type: ignore[arg-type]


def print_plan(project: Project, verdicts: Sequence[Verdict], wanted: set[str]) -> float:
    """Print one line a stage; return the estimated seconds of all stale ones."""
    stale = any(verdict.state == "stale" and verdict.stage in wanted for verdict in verdicts)
    ask = ask_of(project, None if stale else Profile())  # where there is nothing to do, nothing is read
    return sum(cost.seconds for cost in _print_verdicts(project, verdicts, wanted, ask).values())


def _print_verdicts(project: Project, verdicts: Sequence[Verdict], wanted: set[str], ask: Ask) -> dict[str, Cost]:
    """Print one line a stage; return the costs of all stale ones."""
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
        for line in lacking(project.scan.held_out):
            print(f"warning: {line}")
    return costs


def _size(rows: int, shards: int) -> str:
    return f"{counted(rows, 'pair')} in {counted(shards, 'shard')}"


def _print_costs(costs: dict[str, Cost], ask: Ask) -> None:
    for line in table(costs, ask.config.run.prices):
        print(line)
    for line in remarks(costs, ask):
        print(line)


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
