"""``unclip serve BUNDLE``: draw from a page, and from any client of OpenAI's image API."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.client import Cluster, check_answers
from cluster.job import DRIVER_CPUS, DRIVER_MB, Job, public_environment
from cluster.manifests import SERVED_AT, render_service
from cluster.package import Package, code
from cluster.submission import KUBERAY, attach_or_submit, check_reach, stop
from jobs.bundles import RELEASE, find_bundle
from jobs.output import say
from jobs.submit import follow
from pipeline.config import load_config
from pipeline.errors import UserError, install
from pipeline.parse import parse, read_value
from pipeline.store import local_folder, open_store
from serve.settings import ServeSettings

JOB = "unclip-serve"  # one of a cluster
ABOUT = {"serves": "unclip"}
FILE = "served.json"

if TYPE_CHECKING:
    from serve.bundle import ServedBundle


def main(arguments: argparse.Namespace) -> int:
    """Runs ``unclip serve``."""
    if arguments.stop:
        return _stop(arguments.to)
    words = [f"{name}={value}" for name in ("host", "port") if (value := getattr(arguments, name)) is not None]
    settings = read_settings([*arguments.overrides, *words])
    if find_spec("multipart") is None and find_spec("python_multipart") is None:
        raise UserError(f"unclip serve needs more packages: {install('serve')}")
    if arguments.to == KUBERAY:
        say(_rayservice(arguments.bundle, settings), end="")
        return 0
    if arguments.to:
        check_answers(arguments.to)
    else:
        from serve.address import listen

        listening = listen(settings)  # before torch is loaded, which takes seconds
    served = find_served(arguments.bundle)
    heads = (settings.prompt_head, settings.image_head)
    prompt_head, image_head = (path and str(Path(path).expanduser().absolute()) for path in heads)
    settings = replace(settings, prompt_head=prompt_head, image_head=image_head)

    from serve.guard import read_tokens

    tokens = read_tokens(settings)
    if arguments.to:
        return _submit(served, settings, tokens, arguments.to)

    from serve.app import run_server

    run_server(served, settings, tokens, listening, say)
    return 0


def read_settings(words: Sequence[str]) -> ServeSettings:
    """Returns settings from NAME=VALUE. Raises UserError."""
    values = {}
    for word in words:
        name, _, value = word.partition("=")
        if name in values:
            raise UserError(f"{word}: {name} is given twice; leave one of them out")
        values[name] = read_value(value, word)
    return parse(ServeSettings, values, "serve")


def find_served(source: str | None) -> ServedBundle:
    """Returns the bundle at one of PLACES, the newest of the runs by default. Raises UserError where none is there."""
    from serve.bundle import ServedBundle

    if source is not None and source.startswith(RELEASE):
        config = load_config(source.removeprefix(RELEASE), [])
        store = open_store(config.store).url
        served = ServedBundle(config.project, store=store, project=config.project, keys=config.release.keys)
        served.current()
        return served
    bundle = find_bundle(source)
    name = bundle.output.resolve().name
    if bundle.store is None:
        return ServedBundle(name, key=bundle.key, folder=str(bundle.folder.resolve()))
    return ServedBundle(name, store=bundle.store.url, key=bundle.key)


def _rayservice(source: str | None, settings: ServeSettings) -> str:
    """Returns the RayService of a release. Raises UserError for anything that pods cannot follow."""
    if source is None or not source.startswith(RELEASE):
        raise UserError("a RayService serves a release; name release:PROJECT.yaml")
    config = load_config(source.removeprefix(RELEASE), [])
    store, pods = open_store(config.store), config.run.kubernetes
    if settings.tokens:
        raise UserError(f"{settings.tokens} is not copied to pods; put its lines into UNCLIP_TOKENS of a Secret")
    if local_folder(store):
        raise UserError(f"{store.url} is a folder, which no pod can reach; use s3://BUCKET/PREFIX")
    if lost := [path for path in (settings.prompt_head, settings.image_head) if path and not Path(path).is_absolute()]:
        raise UserError(f"{lost[0]} is not copied to pods; name its absolute path in their image")
    if settings.port != ServeSettings().port:
        raise UserError(f"port={settings.port}: a RayService listens at {SERVED_AT}; leave it out")
    most = settings.replicas or max(1, settings.idle_replicas)
    # Pods listen for others, so that a Secret without UNCLIP_TOKENS is refused.
    settings = replace(settings, host="0.0.0.0", replicas=most)
    settings = replace(settings, device="cuda" if pods.gpus else "cpu", cpus=settings.cpus or pods.cpus)
    served = {"name": config.project, "store": store.url, "project": config.project, "keys": config.release.keys}
    arguments = {"served": served, "settings": dataclasses.asdict(settings)}
    environment = public_environment(os.environ)
    service = render_service(config.project, arguments, settings.replicas, pods, environment)
    check_reach(store, {**environment, **pods.env}, KUBERAY)
    return service


def _submit(served: ServedBundle, settings: ServeSettings, tokens: Mapping[str, str], to: str) -> int:
    """Serves on a cluster by a job, follows it, and returns its exit code. Of tokens, their sha256 travels."""
    heads = [path for path in (settings.prompt_head, settings.image_head) if path]
    notes = tuple(f"{path} is not copied: every machine of the cluster must have it there" for path in heads)
    about = {"served": dataclasses.asdict(served), "settings": dataclasses.asdict(settings), "tokens": dict(tokens)}
    package = Package({**code(), FILE: json.dumps(about).encode()}, notes=notes)
    job = Job(JOB, ("python", "-m", "serve", FILE), public_environment(os.environ), DRIVER_CPUS, DRIVER_MB)
    store = open_store(served.store or served.folder)
    check_reach(store, job.environment, to)
    cluster = Cluster(to)
    return follow(cluster, attach_or_submit(cluster, store, job, package, ABOUT, say))


def _stop(to: str | None) -> int:
    if to in (None, KUBERAY):
        raise UserError(
            "--stop ends what --to http://HEAD:8265 began; kubectl delete rayservice NAME ends a RayService"
        )
    ended = stop(Cluster(to), ABOUT)
    say("\n".join(f"{seen.id} was stopped" for seen in ended) or f"no unclip serve runs at {to}")
    return 0
