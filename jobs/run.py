"""``unclip run CONFIG``: makes everything that the configuration asks for, where it is stale."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.artifact import Artifact
from jobs.bundles import remember_bundle
from jobs.output import events_to, say
from jobs.plan import RunPlan, plan_run
from jobs.project import Project, open_project, remember_config
from pipeline.data.curation.stage import CURATION
from pipeline.data.pairs.lost import FILE, check_any_kept, lost_heading, lost_lines, lost_text
from pipeline.data.pairs.stage import PAIRS
from pipeline.doctor.readiness import check_ready
from pipeline.errors import UserError
from pipeline.evaluate.figure import as_text
from pipeline.graph import artifacts as stored
from pipeline.graph.artifacts import load_artifact
from pipeline.graph.execute import execute, make_context
from pipeline.graph.runs import record_run
from pipeline.progress import counted, duration
from pipeline.store import check_conditions
from pipeline.store.records import materialise
from pipeline.training.trackers import tell_result


@dataclass(frozen=True, repr=False)
class StageDone:
    """A stage that was made. As text it is the line that ``unclip run`` prints."""

    stage: str
    artifact: Artifact

    def __repr__(self) -> str:
        ledger = self.artifact.record.ledger
        lost = (("rejected", ledger.rejected), ("deferred", ledger.deferred))
        counts = [f"{counted(sum(reasons.values()), 'row')} {end}" for end, reasons in lost if reasons]
        return ", ".join([f"{self.stage} done: {self.artifact.key[:12]}", *counts])


Tell = Callable[[RunPlan | StageDone], None]


@dataclass(frozen=True, repr=False)
class RunResult:
    """Holds what a run has made. As text it is the table that ``unclip run`` ends with.

    Attributes:
        plan: Plan that was followed.
        artifacts: Artefacts of the wanted stages, by stage.
        seconds: Wall-clock time.
    """

    plan: RunPlan
    artifacts: Mapping[str, Artifact]
    seconds: float

    def __repr__(self) -> str:
        if not self.plan.stale:
            return "nothing to do"
        lines = ["", f"{'stage':16}{'rows or samples':>18}{'rejected':>10}{'seconds':>9}  key"]
        for name, artifact in ((name, made.record) for name, made in self.artifacts.items()):
            amount = artifact.metrics.get("samples_seen", artifact.ledger.kept)
            rejected = sum(artifact.ledger.rejected.values())
            took = f"{artifact.times['seconds']:.1f}" if name in self.plan.stale else "-"
            lines.append(f"{name:16}{amount:>18,}{rejected:>10,}{took:>9}  {artifact.key[:12]}")
            for kind, counts in (("", artifact.ledger.rejected), (", deferred", artifact.ledger.deferred)):
                lines += [f"{'':16}  {count:,} {reason}{kind}" for reason, count in sorted(counts.items())]
            if cut := artifact.metrics.get("captions_cut"):
                lines.append(f"{'':16}  {counted(cut, 'caption')} cut to the tokens that CLIP reads")
        lines += [f"{duration(self.seconds)} in all", ""]
        if "evaluation" in self.artifacts:
            lines += [as_text(self.artifacts["evaluation"].metrics["figures"]), ""]
        return "\n".join(lines)


def main(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    project = open_project(arguments.config, arguments.overrides)
    asked = (project, arguments.only, arguments.until)
    if arguments.dry_run:
        plan = plan_run(*asked, arguments.verbose)
        say(plan)
        if not arguments.yes:
            plan.check()
        return 0
    with events_to(arguments.events) as record:

        def tell(event: RunPlan | StageDone) -> None:
            say(event)
            if isinstance(event, RunPlan):
                record("plan", project=project.config.project, stale=event.stale, keys=event.keys)
            else:
                made = event.artifact.record
                record("stage", stage=event.stage, key=made.key, rows=made.ledger, seconds=made.times["seconds"])

        result = run(*asked, arguments.yes, arguments.verbose, tell)
    say(result)
    made = {name: artifact.record for name, artifact in result.artifacts.items()}
    if result.plan.stale and (pairs := made.get(PAIRS.name)):
        file = str(Path(project.config.run.output) / FILE)
        words = shlex.join([arguments.config, *arguments.overrides])  # as it was run now
        for line in lost_lines(project.store, pairs, made.get(CURATION.name), words, file):
            say(line)
    say(places(project, result.plan.wanted))
    return 0


def run(
    project: Project,
    only: str | None = None,
    until: str | None = None,
    yes: bool = False,
    verbose: bool = False,
    tell: Tell = lambda _: None,
) -> RunResult:
    """Makes what is stale, and what belongs into the output folder. Prints nothing but progress, on standard error.

    Args:
        project: Project to run.
        only: The one stage to make.
        until: The last stage to make.
        yes: Goes on whatever it costs.
        verbose: True for a plan whose text has all costs and every change.
        tell: Function that is told the plan before anything is made, and then each stage.

    Raises:
        UserError: As plan_run and RunPlan.check do, and where a stage cannot be made.
    """
    began = time.monotonic()
    plan = plan_run(project, only, until, verbose)
    tell(plan)
    if not yes:
        plan.check()
    made = project.finished(plan.verdicts)
    if PAIRS.name in plan.wanted & {*made}:
        check_any_kept(project.store, made[PAIRS.name])
    if plan.stale:
        check_ready(project.config, project.store, plan.stale)
        check_conditions(project.store)
        asked_for = project.store, project.config.project, project.graph, plan.verdicts
        record_run(*asked_for, None, project.journal.forgettings, plan.wanted, project.scan.segments)
        remember_config(project.config)
        _place_made(project, made)
        made = _execute(plan, tell)
    else:
        confirm(plan)
    wanted = {stage: Artifact(project.store, made[stage]) for stage in project.graph if stage in plan.wanted & {*made}}
    return RunResult(plan, wanted, time.monotonic() - began)


def _execute(plan: RunPlan, tell: Tell) -> dict[str, stored.Artifact]:
    project = plan.project

    def on_stage(stage: str, made: stored.Artifact) -> None:
        tell(StageDone(stage, Artifact(project.store, made)))
        _place(project, stage, made)
        if stage == PAIRS.name:
            _list_lost(project, made)
            check_any_kept(project.store, made)
        if stage == CURATION.name and (pairs := load_artifact(project.store, PAIRS.name, made.inputs[PAIRS.name])):
            _list_lost(project, pairs, made)
        node = project.graph[stage]
        if node.kind == "result":
            tell_result(make_context(replace(node, inputs=()), made.key, {}, project.store, project.config), made)

    def report(running: Sequence[stored.Artifact], artifacts: Mapping[str, stored.Artifact]) -> None:
        from pipeline.report.page import write_report

        write_report(project.store, project.config, project.graph, artifacts, project.report, running)

    told = project.store, project.config, plan.seconds, on_stage, report
    return execute(project.graph, project.plan(), plan.wanted, *told)


def _place(project: Project, stage: str, made: stored.Artifact) -> None:
    """Writes images, or where the bundle is, into the run's output folder."""
    output = Path(project.config.run.output)
    if stage == "bundle":
        remember_bundle(output, project.store.url, made.key)
    if stage == "samples":
        for path in output.glob("samples/*.png"):  # of a bundle before; those of unclip sample have other names
            if re.fullmatch(r"\d{4}(-64)?\.png", path.name) and path.name not in made.blobs:
                path.unlink()
        materialise(project.store, made.blobs, output / "samples", replace=True)


def _list_lost(project: Project, pairs: stored.Artifact, curation: stored.Artifact | None = None) -> None:
    """Writes which rows were lost into the run's output folder, unless it says so already."""
    from pipeline.report.page import replace_file

    path = Path(project.config.run.output, FILE)
    with suppress(FileNotFoundError), path.open(encoding="utf-8") as file:
        if file.readline() == lost_heading(pairs, curation):
            return
    replace_file(path, lost_text(project.store, pairs, curation))


def _place_made(project: Project, made: Mapping[str, stored.Artifact]) -> None:
    """Writes images, lost rows and where the bundle is, as far as made: there may be those of another configuration."""
    for stage, artifact in made.items():
        _place(project, stage, artifact)
    if pairs := made.get(PAIRS.name):
        _list_lost(project, pairs, made.get(CURATION.name))


def write_output(project: Project) -> None:
    """Writes images, where the bundle is, and then the report, which names them."""
    from pipeline.report.page import write_report

    made = project.finished()
    _place_made(project, made)
    write_report(project.store, project.config, project.graph, made, project.report)


def confirm(plan: RunPlan) -> None:
    """Records that what is made is still asked for, and writes what the output folder lacks."""
    project = plan.project
    remember_config(project.config)
    asked_for = project.store, project.config.project, project.graph, plan.verdicts
    with suppress(UserError):  # somebody who may only read
        record_run(*asked_for, None, project.journal.forgettings, plan.wanted, project.scan.segments, repeated=True)
    if not _shows(plan):
        write_output(project)


def _shows(plan: RunPlan) -> bool:
    """Returns whether the output folder has what a plan without a stale stage says: not another configuration's."""
    project, made = plan.project, {verdict.stage: verdict.key for verdict in plan.verdicts if verdict.state != "stale"}
    try:
        told = json.loads(project.report.with_suffix(".json").read_text())["stages"]
        bundle = json.loads((project.report.parent / "bundle.json").read_text())["bundle"] if "bundle" in made else None
        samples = "samples" not in made or (project.report.parent / "samples").is_dir()
        return (
            project.report.exists()
            and samples
            and bundle == made.get("bundle")
            and {stage["stage"]: stage["key"] for stage in told if stage["made"]} == made
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def places(project: Project, wanted: set[str]) -> str:
    """Returns where report and images are."""
    images = [f"images: {Path(project.config.run.output) / 'samples'}"] if "samples" in wanted else []
    return "\n".join([f"report: {project.report}", *images])
