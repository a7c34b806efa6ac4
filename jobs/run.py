"""``unclip run CONFIG``: makes everything that the configuration asks for, where it is stale."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from jobs.bundles import remember_bundle
from jobs.output import NO_EVENTS, Events, events_to
from jobs.plan import Agreed, agree
from jobs.project import Project, open_project, remember_config
from pipeline.doctor.readiness import check_ready
from pipeline.errors import CorruptObject, UserError
from pipeline.evaluate.figure import as_text
from pipeline.graph.artifacts import Artifact
from pipeline.graph.execute import execute
from pipeline.graph.runs import remember, remember_again
from pipeline.graph.stages import Context
from pipeline.progress import counted, duration
from pipeline.store import check_conditions
from pipeline.store.records import materialise
from pipeline.training.trackers import tell_result

HEALINGS = 5  # damaged objects that one run makes again before it gives up


def main(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    project = open_project(arguments.config, arguments.overrides)
    asked = (project, arguments.only, arguments.until, arguments.yes, arguments.verbose)
    if arguments.dry_run:
        agree(*asked)
        return 0
    with events_to(arguments.events) as events:
        run(*asked, events)
    return 0


def run(
    project: Project,
    only: str | None = None,
    until: str | None = None,
    yes: bool = False,
    verbose: bool = False,
    events: Events = NO_EVENTS,
) -> None:
    """Plans, asks above the budget, executes and reports, and tells it as events. Raises UserError."""
    began = time.monotonic()
    asked = agree(project, only, until, yes, verbose)
    events.tell("plan", project=project.config.project, stale=asked.stale, keys=asked.keys)
    if asked.stale:
        check_ready(project.config, project.store, asked.stale)
        check_conditions(project.store)
        asked_for = project.store, project.config.project, project.graph, asked.verdicts
        remember(*asked_for, None, project.journal.forgettings, asked.wanted, project.scan.segments)
        remember_config(project.config)
        _place_made(project, project.finished(asked.verdicts))
        artifacts = _execute(project, asked, events)
        _summary(artifacts, asked.stale, time.monotonic() - began)
    else:
        confirm(project, asked)
    print_places(project, asked.wanted)


def _execute(project: Project, asked: Agreed, events: Events) -> dict[str, Artifact]:
    def on_stage(stage: str, made: Artifact) -> None:
        lost = {"rejected": made.ledger.rejected, "deferred": made.ledger.deferred}
        counts = [f"{counted(sum(reasons.values()), 'row')} {end}" for end, reasons in lost.items() if reasons]
        print(f"{stage} done: {made.key[:12]}" + "".join(f", {count}" for count in counts), flush=True)
        events.tell("stage", stage=stage, key=made.key, rows=made.ledger, seconds=made.times["seconds"])
        _place(project, stage, made)
        node = project.graph[stage]
        if node.kind == "result":
            settings = getattr(project.config.run, stage, node.settings)
            ctx = Context(project.store, stage, node.version, made.key, node.recipe, settings, {}, project.config)
            tell_result(ctx, made)

    def report(running: Sequence[Artifact], artifacts: Mapping[str, Artifact]) -> None:
        from pipeline.report.page import write_report

        write_report(project.store, project.config, project.graph, artifacts, project.report, running)

    for _ in range(HEALINGS + 1):
        try:
            told = project.store, project.config, asked.seconds, on_stage, report
            return execute(project.graph, project.plan(), asked.wanted, *told)
        except CorruptObject as e:  # it is set aside already
            damage = e
    raise UserError(f"{damage}, after {HEALINGS} others in this run; check the disk or the bucket, then run again")


def _place(project: Project, stage: str, made: Artifact) -> None:
    """Writes images, or where the bundle is, into the run's output folder."""
    output = Path(project.config.run.output)
    if stage == "bundle":
        remember_bundle(output, project.store.url, made.key)
    if stage == "samples":
        for path in output.glob("samples/*.png"):  # of a bundle before; those of unclip sample have other names
            if re.fullmatch(r"\d{4}(-64)?\.png", path.name) and path.name not in made.blobs:
                path.unlink()
        materialise(project.store, made.blobs, output / "samples", replace=True)


def _place_made(project: Project, made: Mapping[str, Artifact]) -> None:
    """Writes images and where the bundle is, as far as they are made: there may be those of another configuration.

    Raises UserError for an image that is damaged, after it is set aside.
    """
    with project.healing(made):
        for stage, artifact in made.items():
            _place(project, stage, artifact)


def bring(project: Project) -> None:
    """Writes images, where the bundle is, and then the report, which names them.

    Raises UserError for an image that is damaged, after it is set aside.
    """
    from pipeline.report.page import write_report

    made = project.finished()
    _place_made(project, made)
    write_report(project.store, project.config, project.graph, made, project.report)


def confirm(project: Project, asked: Agreed) -> None:
    """Says that nothing is stale, records that it is still asked for, and brings what the output folder has not."""
    print("nothing to do")
    remember_config(project.config)
    with suppress(UserError):  # somebody who may only read
        remember_again(
            project.store,
            project.config.project,
            project.graph,
            asked.verdicts,
            project.journal.forgettings,
            asked.wanted,
            project.scan.segments,
        )
    if not _shows(project, asked):
        bring(project)


def _shows(project: Project, asked: Agreed) -> bool:
    """Returns whether the output folder has what a plan without a stale stage says: not another configuration's."""
    made = {verdict.stage: verdict.key for verdict in asked.verdicts if verdict.state != "stale"}
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


def _summary(artifacts: Mapping[str, Artifact], made: Sequence[str], seconds: float) -> None:
    print(f"\n{'stage':16}{'rows or samples':>18}{'rejected':>10}{'seconds':>9}  key")
    for name, artifact in artifacts.items():
        amount = artifact.metrics.get("samples_seen", artifact.ledger.kept)
        rejected = sum(artifact.ledger.rejected.values())
        took = f"{artifact.times['seconds']:.1f}" if name in made else "-"
        print(f"{name:16}{amount:>18,}{rejected:>10,}{took:>9}  {artifact.key[:12]}")
        for kind, counts in (("", artifact.ledger.rejected), (", deferred", artifact.ledger.deferred)):
            for reason, count in sorted(counts.items()):
                print(f"{'':16}  {count:,} {reason}{kind}")
        if cut := artifact.metrics.get("captions_cut"):
            print(f"{'':16}  {counted(cut, 'caption')} cut, for more tokens than CLIP reads")
    print(f"{duration(seconds)} in all\n")
    if "evaluation" in artifacts:
        print(as_text(artifacts["evaluation"].metrics["figures"]) + "\n")


def print_places(project: Project, wanted: set[str]) -> None:
    """Prints where report and images are."""
    print(f"report: {project.report}")
    if "samples" in wanted:
        print(f"images: {Path(project.config.run.output) / 'samples'}")
