"""``unclip submit CONFIG --to WHERE``: runs a configuration on a cluster, and follows it."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from cluster.client import Cluster
from cluster.job import Job, make_job, public_environment
from cluster.local import end_idle, start
from cluster.manifests import render_job
from cluster.package import Package, make_package
from cluster.pods import pod, with_fixed_workers
from cluster.submission import KUBERAY, LOCAL, attach_or_submit, check_reach, put_package, running, stop
from jobs.interrupt import exit_code
from jobs.output import say, warn
from jobs.plan import RunPlan, plan_run
from jobs.project import Project, open_project, remember_config
from jobs.run import confirm, places, write_output
from pipeline.config import Config, load_config
from pipeline.data.source.journal import read_journal
from pipeline.errors import UserError
from pipeline.graph.ray import this_machine
from pipeline.graph.resources import Machine
from pipeline.graph.runs import record_run
from pipeline.settings import RaySettings
from pipeline.store import local_folder, open_store

THERE = "out"  # where a driver on another machine writes its report, which is written here from the store


def main(arguments: argparse.Namespace) -> int:
    """Submits the job, follows it, and brings back its report."""
    if arguments.stop:
        return _stop(load_config(arguments.config, arguments.overrides), arguments.to)
    project = open_project(arguments.config, arguments.overrides)
    _check_place(project, arguments.to)
    only, until, yes = arguments.only, arguments.until, arguments.yes
    tell = warn if arguments.to == KUBERAY else say  # standard output holds the RayJob alone
    plan = plan_run(project, only, until, arguments.verbose, partial(_machine, project, arguments.to))
    tell(plan)
    if plan.stale and not plan.costs:
        end = "" if yes else ", and ends at once if it is above the budget"
        tell(f"the job prints the estimate for its cluster{end}")
    if not yes:
        plan.check()
    if not plan.stale:
        tell("nothing to do")
        confirm(plan)
        tell(places(project, plan.wanted))
        if arguments.to == LOCAL:
            end_idle(_folder(project.config))
        return 0
    remember_config(project.config)
    job = make_job(project.config, project.store.url, plan.keys, os.environ, only, until, yes)
    if arguments.to == KUBERAY:
        say(_rayjob(plan, job), end="")
        return 0
    return _run(plan, job, arguments.to, arguments.detach)


def _check_place(project: Project, to: str) -> None:
    """Raises UserError for a word that is not an address, and for a store that no pod can reach."""
    if to == KUBERAY and local_folder(project.store):
        raise UserError(f"{project.store.url} is a folder, which no pod can reach; use s3://BUCKET/PREFIX")
    if to == KUBERAY and not project.store.url.startswith("s3://"):
        raise UserError(f"{project.store.url}: a RayJob takes its package from S3; use s3://BUCKET/PREFIX")
    if to not in (LOCAL, KUBERAY) and not set(".:") & set(to):
        raise UserError(f"--to {to}: write http://{to}:8265 if that is a cluster's head, or else local or kuberay")


def _machine(project: Project, to: str, ray: RaySettings) -> Machine | None:
    """Returns what the job runs on, as far as it is known before it begins.

    Comes before the plan is printed. Raises UserError if no cluster answers there, or it cannot reach the store.
    """
    if to == LOCAL:
        return this_machine(ray)
    check_reach(project.store, public_environment(os.environ), to)
    return pod(project.config.run.kubernetes) if to == KUBERAY else None  # else the job says it


def _run(plan: RunPlan, job: Job, to: str, detach: bool) -> int:
    """Attaches to the job or submits it, follows it to its end unless ``detach``, and writes what it has made here."""
    project, here = plan.project, to == LOCAL
    package = _package(project, here)
    with running(to, _folder(project.config)) as found:
        if not found:
            say("starting a cluster of two nodes on this machine")
        cluster = found or start(_folder(project.config), project.config.run.ray)
        submission_id = attach_or_submit(cluster, project.store, job, package, _about(project.config), say)
    if detach:
        say(f"{submission_id} runs there: the same command without --detach follows it, --stop stops it")
        return 0
    code = follow(cluster, submission_id)
    if here:
        end_idle(_folder(project.config))
    if code == 0:
        write_output(project)
        say(places(project, plan.wanted))
    return code


def _rayjob(plan: RunPlan, job: Job) -> str:
    """Returns the RayJob, after its package is stored."""
    run = with_fixed_workers(plan.project.config, plan.stale)  # pods come when a stage asks for them
    project = replace(plan.project, config=replace(plan.project.config, run=run))
    render_job(job, "", run, plan.stale)  # raises for wrong settings before anything is sent
    path = put_package(project.store, _package(project))
    asked_for = project.store, project.config.project, project.graph, plan.verdicts
    record_run(*asked_for, path, project.journal.forgettings, plan.wanted, project.scan.segments)
    return render_job(job, f"{project.store.url}/{path}", run, plan.stale)


def follow(cluster: Cluster, submission_id: str) -> int:
    """Prints what a job says until it ends, and returns its exit code; Ctrl-C leaves it running."""
    try:
        end = cluster.follow(submission_id, partial(say, end=""))
    except KeyboardInterrupt as e:
        warn(f"\n{submission_id} keeps running: the same command attaches to it, --stop stops it")
        return exit_code(e)
    if end.status == "SUCCEEDED":
        return 0
    why = f"exit code {end.exit_code}" if end.code is not None else (end.message.splitlines() or ["no reason given"])[0]
    ended = "was stopped" if end.status == "STOPPED" else f"failed ({why})"
    warn(f"{submission_id} {ended}; submit it again to resume it")
    return end.exit_code


def _package(project: Project, here: bool = False) -> Package:
    output = str(Path(project.config.run.output).absolute()) if here else THERE
    return make_package(
        project.config, project.store.url, output, read_journal(project.store, project.config.project), here
    )


def _stop(config: Config, to: str) -> int:
    if to == KUBERAY:
        raise UserError("kubectl get rayjob names it, and kubectl delete rayjob NAME stops it")
    with running(to, _folder(config)) as cluster:
        ended = stop(cluster, _about(config)) if cluster else []
    for seen in ended:
        say(f"{seen.id} was stopped ({seen.status.lower()}); its results are kept")
    if to == LOCAL:
        end_idle(_folder(config))
    if not ended:
        say(f"no job of {config.project} runs there")
    return 0


def _about(config: Config) -> dict[str, str]:
    """Returns the metadata by which a job of a project is known."""
    return {"project": config.project, "store": open_store(config.store).url}


def _folder(config: Config) -> Path:
    """Returns the folder of the local cluster."""
    return Path(config.run.output).absolute() / "cluster"
