"""Describes one job of a cluster. Pure: imports no Ray, and sends nothing.

The id of a job is the key of what it makes, so a second submission finds the job that runs already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pipeline.config import Config
from pipeline.store.records import digest

PROJECT_FILE = "project.yaml"  # in the package
LONGEST = 17  # characters of the project's name in an id, which has at most 45 with a number of up to three digits
# What travels of the submitter's environment: the store's place, and what NCCL, gloo, libfabric and PyTorch read.
PUBLIC = re.compile(
    r"AWS_(ENDPOINT_URL(_S3)?|(DEFAULT_)?REGION)|AZURE_STORAGE_(ACCOUNT_NAME|ENDPOINT)|"
    r"((TORCH_)?NCCL|GLOO|FI)_\w+|PYTORCH_(CUDA_)?ALLOC_CONF"
)
DRIVER_CPUS, DRIVER_MB = 1.0, 4096  # of Python, torch and Ray; a training without workers takes its model's, too


@dataclass(frozen=True)
class Job:
    """A job of a cluster.

    Attributes:
        id: "unclip-<project>-<16 hexadecimal digits>", a DNS label of at most 45 characters.
        command: Command that runs in the unpacked package.
        environment: Environment variables, none of them secret, since the dashboard shows them.
        cpus: Cores of the driver, which runs beside the cluster's head and does what has no workers.
        memory_mb: Memory of the driver.
    """

    id: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    cpus: float
    memory_mb: int

    def again(self, number: int) -> Job:
        """Returns the same job for its ``number``-th submission: a cluster takes an id only once."""
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
    """Returns the job that makes artefacts in a store.

    Run settings, ``yes`` and the code are not part of its id, as they do not change what is made.

    Args:
        config: Configuration, which names the project.
        store_url: URL of the store.
        keys: Keys of the artefacts, by stage.
        environ: Environment of the submitter, of which the job takes what ``PUBLIC`` names.
        only: The one stage to make.
        until: The last stage to make.
        yes: True to go on above the budget.
    """
    words = [f"--{name}={stage}" for name, stage in (("only", only), ("until", until)) if stage]
    command = ("python", "-m", "jobs.cli", "run", PROJECT_FILE, *words, *(["--yes"] if yes else []))
    return Job(job_id(config.project, store_url, keys), command, public_environment(environ), DRIVER_CPUS, DRIVER_MB)


def public_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns what a job takes of its submitter's environment, none of it secret."""
    return {name: value for name, value in sorted(environ.items()) if PUBLIC.fullmatch(name) and value}


def job_id(project: str, store_url: str, keys: Mapping[str, str]) -> str:
    """Returns a name for a job that clusters and Kubernetes accept."""
    name = re.sub(r"[^a-z0-9]+", "-", project.lower())[:LONGEST].strip("-")
    asked = digest(["job", project, store_url, sorted(keys.items())])[:16]
    return "-".join(part for part in ("unclip", name, asked) if part)


def number_of(id: str, submission_id: str) -> int | None:
    """Returns the number of a submission of the job ``id``, or None if it is of another job."""
    found = re.fullmatch(re.escape(id) + r"(?:-([1-9]\d*))?", submission_id)
    return int(found[1] or 1) if found else None
