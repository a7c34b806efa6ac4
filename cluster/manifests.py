"""Fills the templates of cluster/kuberay, in YAML: the RayJob of a job, the RayService of a release. Nothing is sent.

The cluster of a RayJob comes with the job and goes with it. KubeRay's autoscaler adds pods while a stage asks for them
and removes those that are idle, so no GPU stands by while images are fetched. A job that fails is tried again on a new
cluster, because what a stage has done is in the store and is not done again. For a RayService KubeRay keeps the
application running, and replaces a cluster by a new one beside it.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from importlib import metadata
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cluster.job import Job
from cluster.pods import Group, groups, head
from pipeline.config import Run
from pipeline.errors import UserError
from pipeline.settings import NO_SECRET, SECRETS, KubernetesSettings

HEAD_MB = 2048  # MiB of the head's memory for Ray's own processes there
SERVED_AT = 8000  # the port of a RayService
LONGEST_NAME = 47  # characters; KubeRay adds to it and has to stay below 63


def render_job(job: Job, package: str, run: Run, stages: Collection[str]) -> str:
    """Returns the YAML of the RayJob that runs ``job``.

    Args:
        job: Job with the command of the driver, which runs in the unpacked package.
        package: URL of the package, s3://...
        run: Run settings, which say what workers take and what pods have.
        stages: Stages that have to be made.

    Raises:
        UserError: The image is missing, the job's environment has a secret or something that would not reach the driver
            as it is, or workers or the driver fit into no pod.
    """
    settings = run.kubernetes
    _check(job, package, settings)
    return _fill(
        "rayjob",
        settings,
        {**settings.env, **job.environment},
        groups(run, stages),
        grows=not settings.queue,
        labels={"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else {},
        job=job,
        entrypoint=shlex.join(job.command),
        package=package,
        deadline_s=math.ceil(settings.deadline_hours * 3600),
    )


def render_service(
    project: str,
    arguments: Mapping[str, Any],
    replicas: int,
    settings: KubernetesSettings,
    environment: Mapping[str, str],
) -> str:
    """Returns the YAML of the RayService of a project.

    Args:
        project: Name of the project, from which the RayService gets its own.
        arguments: Arguments of the application's builder.
        replicas: Pods that draw, at most; the autoscaler adds and removes them.
        settings: Settings of the pods.
        environment: Environment variables of the submitter, which pods get besides those of the settings.

    Raises:
        UserError: Without an image or the Secret that holds the tokens, and for a secret among the environment.
    """
    _check_pods(settings, environment)
    if not settings.secret:
        raise UserError(
            "run.kubernetes.secret: missing; name a Secret whose entry UNCLIP_TOKENS holds lines NAME TOKEN, without "
            "which anybody could draw"
        )
    gpus = settings.gpus
    shape = settings.cpus, settings.memory_gb
    if gpus:  # a pod draws on one GPU, so it takes that GPU's share of a node
        shape = max(1, settings.gpu_cpus // gpus), max(1, settings.gpu_memory_gb // gpus)
    return _fill(
        "rayservice",
        settings,
        {**environment, **settings.env},
        [Group("replicas", replicas, *shape, min(gpus, 1))],
        grows=True,
        labels={},
        name=f"unclip-{re.sub(r'[^a-z0-9]+', '-', project.lower()).strip('-')}"[:LONGEST_NAME].strip("-"),
        arguments=arguments,
        port=SERVED_AT,
        drain_s=math.ceil(arguments["settings"]["drain_s"]),
    )


def _check(job: Job, package: str, settings: KubernetesSettings) -> None:
    _check_pods(settings, job.environment)
    if len(job.id) > LONGEST_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job.id):
        raise UserError(f"{job.id}: not a name for a RayJob, which has up to {LONGEST_NAME} of a-z, 0-9 and -")
    for name, value in {"package": package, **job.environment}.items():
        if re.search(r"[$`]", value):  # KubeRay hands it to a shell between double quotes
            raise UserError(f"{name}: {value!r} holds $ or `, which would not reach the cluster as it is")
    room_mb = settings.head_memory_gb * 1024 - head(settings).store_mb - HEAD_MB
    if job.cpus > settings.head_cpus or job.memory_mb > room_mb:
        raise UserError(
            f"run.kubernetes.head_cpus, head_memory_gb: the driver takes {job.cpus:g} cores and {job.memory_mb} MiB, "
            f"but the head has {settings.head_cpus} and, beside Ray's own, {room_mb}; raise them"
        )


def _check_pods(settings: KubernetesSettings, names: Iterable[str]) -> None:
    """Raises UserError without an image, and for a variable of the environment that is called like a secret."""
    if not settings.image:
        raise UserError("run.kubernetes.image: missing; build cluster/Dockerfile, push it, and name it here")
    for name in names:
        if SECRETS.search(name):
            raise UserError(f"{name}: {NO_SECRET}")


def _fill(
    template: str,
    settings: KubernetesSettings,
    environment: Mapping[str, str],
    workers: Collection[Group],
    labels: Mapping[str, str],
    **values: Any,
) -> str:
    """Returns the resource of Kubernetes that a template of cluster/kuberay becomes.

    Args:
        template: Name of the template.
        settings: Settings of the pods.
        environment: Environment variables of every pod.
        workers: Groups of worker pods.
        labels: Labels of the resource, besides those of the settings.
        values: Values that only this template knows.
    """
    about = {"labels": settings.labels, "annotations": settings.annotations}
    return _templates.get_template(f"{template}.yaml.j2").render(
        settings=settings,
        environment=environment,
        head=head(settings),
        workers=workers,
        labels={"app.kubernetes.io/name": "unclip", **settings.labels, **labels},
        pod_metadata={name: entries for name, entries in about.items() if entries},
        ray_version=metadata.version("ray"),
        **values,
    )


class _Dumper(yaml.SafeDumper):
    """Quotes every text, so that no value of a user is anything else, and writes what is used twice in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _yaml(value: Any) -> str:
    """Returns a value as one line of YAML, in the style of JSON."""
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=math.inf).rstrip("\n")


_templates = Environment(
    loader=PackageLoader("cluster", "kuberay"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_templates.filters["yaml"] = _yaml
