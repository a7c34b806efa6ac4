"""Finds the cluster and the job there, and submits the job unless it runs already."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from cluster.client import Cluster, JobInfo, check_answers, dashboard_url
from cluster.job import Job, number_of
from cluster.local import find, locked
from cluster.package import Package, package_path, send_weights, write_zip
from pipeline.errors import UserError
from pipeline.progress import counted
from pipeline.store import Store, local_folder

LOCAL, KUBERAY = "local", "kuberay"  # of --to; all else is an address
LOOPBACK = ("localhost", "127.0.0.1", "::1")
log = logging.getLogger("unclip")


@contextmanager
def running(to: str, folder: Path) -> Iterator[Cluster | None]:
    """Yields the cluster ``to``, or None if the local one of ``folder`` does not run; it does not end meanwhile.

    Raises UserError if no cluster answers there.
    """
    if to != LOCAL:
        yield Cluster(to)
        return
    with locked(folder):
        yield find(folder)


def check_reach(store: Store, environment: Mapping[str, str], to: str) -> None:
    """Raises UserError where another machine would look for the store in itself, and where no cluster answers.

    Logs what a store in a folder needs, also for an address of loopback, which a tunnel may have.
    """
    if to == KUBERAY or urlsplit(dashboard_url(to)).hostname not in LOOPBACK:
        for name, url in environment.items():
            if urlsplit(url).hostname in LOOPBACK:
                raise UserError(
                    f"{name} is {url}, which a machine of the cluster looks for in itself; name the server's host"
                )
    if to != KUBERAY:
        check_answers(to)
    if local_folder(store):
        log.warning("%s is a folder: every machine of the cluster must mount it there", store.url)


def put_package(store: Store, package: Package) -> str:
    """Stores what a job needs, for machines that read it there; returns the path of its zip."""
    with _zipped(store, package) as file:
        path = package_path(file)
        store.create(path, file)
    return path


def attach_or_submit(
    cluster: Cluster, store: Store, job: Job, package: Package, about: Mapping[str, str], tell: Callable[[str], None]
) -> str:
    """Submits a job unless it runs already; returns the id of its submission.

    Args:
        cluster: Ray cluster to run on.
        store: Store for weights that are too large for the package.
        job: Job to submit.
        package: Code package that the job takes along.
        about: Metadata by which the job is found again.
        tell: Function that is called with lines of text on what is done.
    """
    attempts = cluster.attempts(job)
    if live := [seen for seen in attempts if seen.live]:
        tell(f"{live[-1].id} runs already; its output so far:")
        if live[-1].metadata.get("package") != package.key:
            log.warning("its code or run settings differ from yours; --stop ends it")
        return live[-1].id
    if attempts:
        last = attempts[-1]
        tell(f"{last.id} has ended ({last.status.lower()}); its results are kept")
        job = job.again((number_of(job.id, last.id) or 1) + 1)
    with _zipped(store, package) as file:
        size = f"{counted(len(package.files), 'file')}, {file.stat().st_size / 1e6:.1f} MB"
        cluster.submit(job, file, {**about, "package": package.key})
    tell(f"{job.id} is submitted to {cluster.address}: {size}")
    return job.id


@contextmanager
def _zipped(store: Store, package: Package) -> Iterator[Path]:
    """Logs what does not travel, stores weights that are too large for the package, and yields its zip."""
    for note in package.notes:
        log.warning(note)
    send_weights(store, package)
    with tempfile.TemporaryDirectory() as folder:
        yield write_zip(package, Path(folder) / "package.zip")


def stop(cluster: Cluster, about: Mapping[str, str]) -> list[JobInfo]:
    """Stops every live job with this metadata; returns them as they ended."""
    return [cluster.stop(seen.id) for seen in cluster.jobs() if seen.live and seen.metadata.items() >= about.items()]
