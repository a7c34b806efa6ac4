"""``unclip serve BUNDLE``: draw from a page, and from any client of OpenAI's image API."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import socket
import threading
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cluster.rayservice import render_service
from jobs.bundles import RELEASE, find_bundle
from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.graph.ray import start_ray
from pipeline.parse import parse
from pipeline.settings import RaySettings
from pipeline.store import local_folder, open_store
from serve.settings import ServeSettings

KUBERAY = "kuberay"

if TYPE_CHECKING:
    from serve.bundle import Served


def main(arguments: argparse.Namespace) -> int:
    """Runs ``unclip serve``."""
    settings = read_settings(arguments.overrides)
    if find_spec("multipart") is None and find_spec("python_multipart") is None:
        raise UserError("unclip serve needs more packages; install them with pip install 'unclip-ray[serve]'")
    if arguments.to == KUBERAY:
        print(_rayservice(arguments.bundle, settings), end="")
        return 0
    served = find_served(arguments.bundle)
    heads = (settings.prompt_head, settings.image_head)
    prompt_head, image_head = (path and str(Path(path).absolute()) for path in heads)
    settings = replace(settings, prompt_head=prompt_head, image_head=image_head)
    settings = replace(settings, port=settings.port or _free_port(settings.host))

    from serve.app import start, stop
    from serve.guard import read_tokens

    tokens = read_tokens(settings)

    start_ray(RaySettings())
    print(f"loading {served.name} ...", flush=True)
    start(served, settings, tokens)
    host = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
    print(f"the studio is at http://{host}:{settings.port}/, the API at http://{host}:{settings.port}/v1", flush=True)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        ended.wait()
    finally:
        stop()
    return 0


def read_settings(words: Sequence[str]) -> ServeSettings:
    """Returns settings from NAME=VALUE. Raises UserError."""
    values = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{word}: {value} is not a value; write a number or a word") from None
    return parse(ServeSettings, values, "serve")


def find_served(source: str | None) -> Served:
    """Returns the bundle at one of PLACES, the newest of the runs by default. Raises UserError where none is there."""
    from serve.bundle import Served

    if source is not None and source.startswith(RELEASE):
        config = load_config(source.removeprefix(RELEASE), [])
        served = Served(config.project, store=open_store(config.store).url, project=config.project)
        served.current()
        return served
    bundle = find_bundle(source)
    name = bundle.output.resolve().name
    if bundle.store is None:
        return Served(name, key=bundle.key, folder=str(bundle.folder.resolve()))
    return Served(name, store=bundle.store.url, key=bundle.key)


def _rayservice(source: str | None, settings: ServeSettings) -> str:
    """Returns the RayService of a release. Raises UserError for anything that pods cannot follow."""
    if source is None or not source.startswith(RELEASE):
        raise UserError("a RayService serves what pods can reach and follow; name release:PROJECT.yaml")
    config = load_config(source.removeprefix(RELEASE), [])
    store, pods = open_store(config.store), config.run.kubernetes
    if local_folder(store):
        raise UserError(f"{store.url} is a folder, which no pod can reach; use s3://BUCKET/PREFIX")
    settings = replace(settings, device="cuda" if pods.gpus else "cpu", cpus=settings.cpus or pods.cpus)
    served = {"name": config.project, "store": store.url, "project": config.project}
    arguments = {"served": served, "settings": dataclasses.asdict(settings)}
    return render_service(config.project, arguments, settings.replicas, pods)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]
