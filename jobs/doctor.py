"""``unclip doctor [CONFIG]``: checks machine, packages, store, list, CLIP and Ray, and leaves nothing behind."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jobs.output import print_json, say
from jobs.plan import plan_run
from jobs.project import Project, project_of
from pipeline.build import build
from pipeline.config import Config, load_config
from pipeline.cost.limits import lacking
from pipeline.cost.table import places
from pipeline.data.fetch.opener import Guard
from pipeline.data.pairs.lost import blocked_rows
from pipeline.doctor.clip_weights import check_clips
from pipeline.doctor.finding import Finding
from pipeline.doctor.machine import check_disks, check_machine, check_memory, check_shared_memory
from pipeline.doctor.nodes import check_nodes
from pipeline.doctor.packages import check_packages
from pipeline.doctor.storage import check_store
from pipeline.errors import UserError
from pipeline.held_out import HELD_OUT_SPLITS
from pipeline.progress import counted
from pipeline.settings import RaySettings
from pipeline.store import Store, local_folder, open_store


def main(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    findings: list[Finding] = []
    for finding in examine(config):
        findings.append(finding)
        if not arguments.json:
            say(finding)
    levels = Counter(finding.level for finding in findings)
    if arguments.json:
        print_json({"findings": findings, "problems": levels["problem"], "warnings": levels["warning"]})
    else:
        say(f"problems: {levels['problem']}, warnings: {levels['warning']}")
    return 1 if levels["problem"] else 0


def examine(config: Config | None) -> Iterator[Finding]:
    """Yields all findings, each as soon as it is known. Raises UserError for a store that no URL can name."""
    settings = config.run.ray if config else RaySettings()
    yield from check_packages()
    yield from check_machine()
    yield from check_memory(config)
    yield from check_shared_memory(settings)
    store = None
    if config:
        store = open_store(config.store)
        folder = local_folder(store)
        yield from check_disks(({"store": folder} if folder else {}) | {"output": Path(config.run.output)})
        for finding in check_store(store):
            yield finding
            store = store if finding.level == "ok" else None
        yield from _check_project(config, store)
    yield from check_nodes(settings, store)


def _check_project(config: Config, store: Store | None) -> Iterator[Finding]:
    """Checks the list, where the store can be read, and every CLIP that a run would load."""
    stale, project = set(build(config)), None
    if store:
        try:
            project = project_of(config, store)
        except UserError as e:
            yield Finding("problem", "list", str(e))
        else:
            held_out = project.scan.held_out
            splits = " and ".join(f"{held_out.get(split, 0):,} for {split}" for split in HELD_OUT_SPLITS)
            yield Finding("ok", "list", f"{counted(project.rows, 'row')}, of which {splits}")
            yield from _check_references(config)
            yield from (Finding("warning", "list", line) for line in project.warnings(stale))
            stale &= {verdict.stage for verdict in project.plan() if verdict.state == "stale"}
    yield from check_clips(config, stale)
    if project and stale:
        yield from _check_places(project)


def _check_references(config: Config) -> Iterator[Finding]:
    """Yields the rows that no run reads because of where their images lie: a problem where they are nearly all."""
    try:
        blocked = blocked_rows(config.source, Guard(config.run.pairs.hosts, config.pairs.allow))
    except UserError as e:
        yield Finding("problem", "list", str(e))
        return
    for line in blocked.lines():
        yield Finding("problem" if blocked.nearly_all else "warning", "list", line)


def _check_places(project: Project) -> Iterator[Finding]:
    """Yields on what the stages will run, and a warning for what this machine lacks for them."""
    try:
        plan = plan_run(project)
    except UserError:  # of a cluster that does not answer, or a CLIP that is nowhere: other checks say so
        return
    yield Finding("ok", "stages", places(plan.costs, plan.ask))
    for lack in lacking(plan.costs, plan.ask, project.store):
        yield Finding("warning", "stages", lack.what, lack.advice)
