"""Which cluster, and which job there: the one that runs already, or a new one."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from cluster.client import Cluster, Seen
from cluster.job import Job, number_of
from cluster.local import find, locked, start
from cluster.package import Package, package_path, send_weights, write_zip
from pipeline.errors import UserError
from pipeline.progress import counted
from pipeline.settings import RaySettings
from pipeline.store import Store, local_folder

LOCAL = "local"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@contextmanager
def running(to: str, folder: Path) -> Iterator[Cluster | None]:
    """The cluster ``to``; of the local one of ``folder``, which does not end meanwhile, None if it does not run.

    Raises UserError if no cluster answers there.
    """
    if to != LOCAL:
        yield Cluster(to)
        return
    with locked(folder):
        found = find(folder)
        yield Cluster(*found) if found else None


def started(folder: Path, settings: RaySettings) -> Cluster:
    """The local cluster of ``folder``, started. Call it in ``running``."""
    print("starting a cluster of two nodes on this machine", flush=True)
    return Cluster(*start(folder, settings))


def check_reach(store: Store, job: Job, to: str) -> None:
    """Say what another machine needs to see the store. Raises UserError where it would look for it in itself."""
    if urlsplit(to if "://" in to else f"//{to}").hostname in LOOPBACK:
        return
    if local_folder(store):
        print(f"note: {store.url} is a folder: every machine of the cluster must mount it there", file=sys.stderr)
    for name, url in job.environment.items():
        if urlsplit(url).hostname in LOOPBACK:
            raise UserError(
                f"{name} is {url}, which a machine of the cluster looks for in itself; name the server's host"
            )


def put_package(store: Store, package: Package) -> str:
    """Put what a job needs into the store, for machines that read it there; the path of its zip."""
    print_notes(package)
    send_weights(store, package)
    with tempfile.TemporaryDirectory() as folder:
        file = write_zip(package, Path(folder) / "package.zip")
        path = package_path(file)
        store.create(path, file)
    return path


def attach_or_submit(cluster: Cluster, store: Store, job: Job, package: Package, about: Mapping[str, str]) -> str:
    """The id under which the job runs. It is submitted, ``about`` it this, unless it runs already."""
    attempts = cluster.attempts(job)
    if live := [seen for seen in attempts if seen.live]:
        print(f"{live[-1].id} runs already; what it said so far:", flush=True)
        if live[-1].metadata.get("package") != package.key:
            print("its code or run settings are others than yours; unclip submit --stop ends it", file=sys.stderr)
        return live[-1].id
    if attempts:
        last = attempts[-1]
        print(f"{last.id} has ended ({last.status.lower()}); what it has made stays made")
        job = job.again((number_of(job.id, last.id) or 1) + 1)
    print_notes(package)
    send_weights(store, package)
    with tempfile.TemporaryDirectory() as folder:
        file = write_zip(package, Path(folder) / "package.zip")
        size = f"{counted(len(package.files), 'file')}, {file.stat().st_size / 1e6:.1f} MB"
        cluster.submit(job, file, {**about, "package": package.key})
    print(f"{job.id} is submitted to {cluster.address}: {size}", flush=True)
    return job.id


def print_notes(package: Package) -> None:
    """Say what does not travel."""
    for note in package.notes:
        print(f"note: {note}", file=sys.stderr)


def stop(cluster: Cluster, about: Mapping[str, str]) -> list[Seen]:
    """Stop every job that runs and was submitted ``about`` this; as they have ended."""
    return [cluster.stop(seen.id) for seen in cluster.jobs() if seen.live and seen.metadata.items() >= about.items()]
