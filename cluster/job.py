"""One job: what is asked of a cluster, whichever it is. Pure: no Ray, and nothing is sent.

Its id is the key of what is asked, so that who asks twice finds the job that runs already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pipeline.config import Config
from pipeline.store.records import digest

PROJECT_FILE = "project.yaml"  # in the package
LONGEST = 17  # characters of the project's name in an id, which has at most 45 with a number of up to three digits
PLAIN = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")  # of the AWS variables
DRIVER_CPUS, DRIVER_MB = 1.0, 4096  # of Python, torch and Ray; a training without workers takes its model's, too


@dataclass(frozen=True)
class Job:
    """``id``: "unclip-<project>-<16 hexadecimal digits>", a DNS label of at most 45 characters. ``command`` runs in the
    unpacked package. ``environment`` holds no secret: whoever sees the dashboard reads it. ``cpus`` and ``memory_mb``:
    what the driver takes, which runs beside the cluster's head and does itself what has no workers."""

    id: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    cpus: float
    memory_mb: int

    def again(self, number: int) -> Job:
        """The same job for the ``number``-th time: a cluster takes an id only once, though what is done stays done."""
        return self if number == 1 else replace(self, id=f"{self.id}-{number}")


def make_job(
    config: Config,
    store_url: str,
    keys: Mapping[str, str],
    environ: Mapping[str, str],
    only: str | None = None,
    until: str | None = None,
    yes: bool = False,
) -> Job:
    """The job that makes ``keys``, the artefacts that are wanted by stage, in the store at ``store_url``.

    Run settings, ``yes`` and the code are no part of its id: they do not change what is asked. ``environ``: of whoever
    submits; the job takes over where the store's server is.
    """
    words = [f"--{name}={stage}" for name, stage in (("only", only), ("until", until)) if stage]
    command = ("python", "-m", "jobs.run", PROJECT_FILE, *words, *(["--yes"] if yes else []))
    environment = {name: environ[name] for name in PLAIN if environ.get(name)}
    return Job(job_id(config.project, store_url, keys), command, environment, DRIVER_CPUS, DRIVER_MB)


def job_id(project: str, store_url: str, keys: Mapping[str, str]) -> str:
    """A name for what is asked that clusters and Kubernetes accept."""
    name = re.sub(r"[^a-z0-9]+", "-", project.lower())[:LONGEST].strip("-")
    asked = digest(["job", project, store_url, sorted(keys.items())])[:16]
    return "-".join(part for part in ("unclip", name, asked) if part)


def number_of(id: str, submission_id: str) -> int | None:
    """The how-manieth time ``submission_id`` is of the job ``id``; None if it is another job."""
    found = re.fullmatch(re.escape(id) + r"(?:-([1-9]\d*))?", submission_id)
    return int(found[1] or 1) if found else None
