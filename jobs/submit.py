"""``unclip submit CONFIG --to WHERE``: let a cluster make everything the configuration asks for, and follow it."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cluster.job import Job, make_job, number_of
from cluster.package import Package, make_package, send_weights, write_zip
from jobs.interrupt import INTERRUPTED
from jobs.plan import Agreed, agree
from jobs.project import Project, open_project
from jobs.run import print_places
from jobs.sample import remember_bundle
from pipeline.config import OVERRIDES, Config, load_config
from pipeline.errors import UserError
from pipeline.progress import counted
from pipeline.store import local_folder, open_store

if TYPE_CHECKING:
    from cluster.client import Cluster

WHERE = "local: two nodes on this machine; or the address of a cluster's dashboard, such as http://HOST:8265"
THERE = "out"  # where a driver on another machine writes its report, which is written here from the store
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="unclip submit", description=__doc__)
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument("--to", metavar="WHERE", required=True, help=WHERE)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only", metavar="STAGE", help="make this stage only; its inputs must be there")
    what.add_argument("--until", metavar="STAGE", help="make this stage and all that it needs")
    what.add_argument("--stop", action="store_true", help="stop what runs there of this project")
    parser.add_argument("--yes", action="store_true", help="go on even above run.budget_hours")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.stop:
        return _stop(load_config(arguments.config, arguments.overrides), arguments.to)
    project = open_project(arguments.config, arguments.overrides)
    asked = agree(project, arguments.only, arguments.until, arguments.yes)
    if not asked.stale:
        print("nothing to do")
        if not project.report.exists():
            _bring(project, asked)
        print_places(project, asked.wanted)
        return 0
    job = make_job(
        project.config, project.store.url, asked.keys, os.environ, arguments.only, arguments.until, arguments.yes
    )
    here = arguments.to == "local"
    if not here:
        _check_reach(project, job, arguments.to)
    output = str(Path(project.config.run.output).absolute()) if here else THERE
    package = make_package(project.config, project.store.url, output, here)
    cluster, submission_id = _begin(project, job, package, arguments.to)
    return _follow(project, asked, cluster, submission_id)


def _begin(project: Project, job: Job, package: Package, to: str) -> tuple[Cluster, str]:
    """The cluster and the job there that runs, which is submitted unless it runs already."""
    from cluster.client import Cluster
    from cluster.local import find, locked, start

    if to != "local":
        cluster = Cluster(to)
        return cluster, _submit(cluster, project, job, package)
    folder = _folder(project.config)
    with locked(folder):
        running = find(folder)
        if running is None:
            print("starting a cluster of two nodes on this machine", flush=True)
            running = start(folder, project.config.run.ray)
        cluster = Cluster(*running)
        return cluster, _submit(cluster, project, job, package)


def _submit(cluster: Cluster, project: Project, job: Job, package: Package) -> str:
    attempts = cluster.attempts(job)
    if running := [seen for seen in attempts if seen.live]:
        seen = running[-1]
        print(f"{seen.id} runs already; what it said so far:", flush=True)
        if seen.metadata.get("package") != package.key:
            print("its code or run settings are others than yours; unclip submit --stop ends it", file=sys.stderr)
        return seen.id
    for note in package.notes:
        print(f"note: {note}")
    if attempts:
        last = attempts[-1]
        print(f"{last.id} has ended ({last.status.lower()}); what it has made stays made")
        job = job.again((number_of(job.id, last.id) or 1) + 1)
    send_weights(project.store, package)
    metadata = {"project": project.config.project, "store": project.store.url, "package": package.key}
    with tempfile.TemporaryDirectory() as folder:
        file = write_zip(package, Path(folder) / "package.zip")
        size = file.stat().st_size
        cluster.submit(job, file, metadata)
    print(f"{job.id} is submitted to {cluster.address}: {counted(len(package.files), 'file')}, {size / 1e6:.1f} MB")
    return job.id


def _follow(project: Project, asked: Agreed, cluster: Cluster, submission_id: str) -> int:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        end = cluster.follow(submission_id, write)
    except KeyboardInterrupt:
        print(
            f"\n{submission_id} goes on; the same command attaches to it, with --stop in place of --only or --until it "
            "is stopped",
            file=sys.stderr,
        )
        return INTERRUPTED
    if end.status == "SUCCEEDED":
        _bring(project, asked)
        print_places(project, asked.wanted)
    elif end.status == "STOPPED":
        print(f"{submission_id} was stopped; submit it again to go on where it was", file=sys.stderr)
    else:
        why = f"exit code {end.exit_code}" if end.code is not None else end.message.splitlines()[0]
        print(f"{submission_id} failed ({why}); submit it again to go on where it was", file=sys.stderr)
    return end.exit_code


def _bring(project: Project, asked: Agreed) -> None:
    """Write report and pictures here, from the store."""
    from pipeline.report.page import write_report
    from pipeline.samples import export_pictures

    made, output = project.finished(), Path(project.config.run.output)
    write_report(project.store, project.config, made, project.report)
    if "bundle" in made:
        remember_bundle(output, project.store.url, made["bundle"].key)
    if "samples" in asked.wanted & made.keys():
        export_pictures(project.store, made["samples"], output / "samples")


def _stop(config: Config, to: str) -> int:
    from cluster.client import Cluster
    from cluster.local import find, locked

    if to == "local":
        with locked(_folder(config)):
            running = find(_folder(config))
        cluster = Cluster(*running) if running else None
    else:
        cluster = Cluster(to)
    ours = {"project": config.project, "store": open_store(config.store).url}
    live = [seen for seen in cluster.jobs() if seen.live and seen.metadata.items() >= ours.items()] if cluster else []
    for seen in live:
        assert cluster is not None
        print(f"{seen.id}: {cluster.stop(seen.id).status.lower()}; what it has made stays made")
    if not live:
        print(f"nothing of {config.project} runs there")
    return 0


def _folder(config: Config) -> Path:
    """Where the local cluster is found again."""
    return Path(config.run.output).absolute() / "cluster"


def _check_reach(project: Project, job: Job, to: str) -> None:
    """Raise UserError where another machine would look for the store in itself."""
    if urlsplit(to if "://" in to else f"//{to}").hostname in LOOPBACK:
        return
    if local_folder(project.store):
        print(f"note: {project.store.url} is a folder: every machine of the cluster must mount it there")
    for name, url in job.environment.items():
        if urlsplit(url).hostname in LOOPBACK:
            raise UserError(
                f"{name} is {url}, which a machine of the cluster looks for in itself; name the server's host"
            )


if __name__ == "__main__":
    from jobs.cli import guard

    sys.exit(guard(main, sys.argv[1:]))
