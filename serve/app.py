"""``unclip serve`` as one process for one replica, and with Ray's processes for more: the same gateway and queue."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from pipeline.errors import UserError
from pipeline.graph.ray import start_ray, this_machine
from pipeline.parse import parse
from pipeline.settings import RaySettings
from serve.address import url_host
from serve.api import make_api
from serve.bundle import ServedBundle
from serve.gateway import Gateway, ResultCache
from serve.guard import CONNECTIONS, read_tokens, requests_log
from serve.metrics import Metrics
from serve.pool import Handle, ReplicaPool
from serve.queue import RequestQueue
from serve.replica import Replica
from serve.server import Server
from serve.settings import ServeSettings

HEAD = {"node:__internal_head__": 0.001}  # where the gateway is: the end of another node ends nobody's wait


class Service:
    """A gateway with its replicas and its application.

    ``gpu`` says whether replicas on Ray have a GPU each; None takes one replica in this process.
    """

    def __init__(self, served: ServedBundle, settings: ServeSettings, tokens: Mapping[str, str], gpu: bool | None):
        self.metrics = Metrics()
        lines = logging.StreamHandler()
        lines.setFormatter(logging.Formatter("%(message)s"))  # each is a JSON object
        requests_log.handlers, requests_log.propagate, requests_log.level = [lines], False, logging.INFO

        async def start() -> Handle:
            if gpu is None:
                return await asyncio.to_thread(Replica, served, settings)
            from serve.processes import RemoteReplica

            return await RemoteReplica.start(served, settings, gpu)

        self.pool = ReplicaPool(start, settings, self.metrics, lambda hangs: self.queue.tell_hang(hangs))
        self.queue = RequestQueue(self.pool.draw, settings, self.metrics)
        results, pool = ResultCache(settings.results_mb << 20), self.pool
        self.gateway = Gateway(served, settings, self.queue, results, pool.describe, self.metrics, pool.ready)
        self.api = make_api(self.gateway, tokens, self.metrics.text)


def run_server(
    served: ServedBundle,
    settings: ServeSettings,
    tokens: Mapping[str, str],
    listening: socket.socket,
    tell: Callable[[str], None],
) -> None:
    """Serves at a socket until this process is told to end, and tells where as soon as an image could be drawn.

    What it started ends with it, and nothing else on its cluster; requests that were accepted are answered first.
    Raises UserError where the bundle cannot be loaded.
    """
    tell(f"loading {served.name} ...")
    settings = replace(settings, port=listening.getsockname()[1])
    here, gpu = one_process(settings), None
    asked = settings.replicas
    if here is None:
        start_ray(RaySettings())
        from serve.processes import fit_to_cluster

        settings, gpu = fit_to_cluster(settings)
    else:
        settings = here
    # All that are there already; those that a cluster may have to add come when they are needed.
    first = max(1, settings.idle_replicas) if asked else settings.replicas
    asyncio.run(_run_server(Service(served, settings, tokens, gpu), settings, first, listening, tell))


def one_process(settings: ServeSettings) -> ServeSettings | None:
    """Returns the settings of a server that draws in this process; None where replicas are processes of Ray.

    Raises UserError for a GPU that is not there.
    """
    if os.environ.get("RAY_ADDRESS") or max(settings.replicas, settings.idle_replicas) > 1:
        return None
    gpus = 0 if settings.device == "cpu" else this_machine(RaySettings()).gpus
    if settings.device == "cuda" and not gpus:
        raise UserError("serve: device=cuda, but torch finds no GPU on this machine; leave device out")
    return None if gpus > 1 and not settings.replicas else replace(settings, replicas=1)


async def _run_server(
    service: Service, settings: ServeSettings, first: int, listening: socket.socket, tell: Callable[[str], None]
) -> None:
    await service.pool.open(first)
    host = url_host(settings.host)
    url = f"http://{host}:{settings.port}"
    tell(f"the studio is at {url}/, the API at {url}/v1")
    if os.environ.get("RAY_ADDRESS"):
        to_here = f"{settings.port}:{host}:{settings.port}"
        tell(f"on the cluster's head, that is: ssh -L {to_here} HEAD brings it here")
    traffic = service.gateway.traffic
    server = Server(service.api, traffic.drain, lambda: traffic.open, service.queue.cut, settings.drain_s)
    try:
        await server.serve([listening])
    finally:
        await service.pool.close()


def application(arguments: Mapping[str, Any]) -> Any:
    """Returns the application where Ray Serve builds it from a file, as KubeRay's RayService does."""
    from ray import serve

    settings = parse(ServeSettings, arguments["settings"], "serve")
    gateway: Any = serve.deployment(
        serve.ingress()(GatewayDeployment),
        name="gateway",
        max_ongoing_requests=CONNECTIONS,
        graceful_shutdown_timeout_s=settings.drain_s,
        ray_actor_options={"num_cpus": 0, "resources": HEAD},
    )
    return gateway.bind(ServedBundle(**arguments["served"]), settings, read_tokens(settings))


class GatewayDeployment:
    """The gateway where Ray Serve speaks HTTP."""

    def __init__(self, served: ServedBundle, settings: ServeSettings, tokens: Mapping[str, str]):
        logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
        from serve.processes import fit_to_cluster

        settings, gpu = fit_to_cluster(settings)
        service = Service(served, settings, tokens, gpu)

        @asynccontextmanager
        async def lifespan(_: Any) -> AsyncIterator[None]:
            await service.pool.open(max(1, settings.idle_replicas))
            yield
            service.gateway.traffic.drain()  # Ray has waited for what was accepted; something may come late
            await service.pool.close()

        service.api.router.lifespan_context = lifespan
        self.api = service.api

    def __serve_build_asgi_app__(self) -> Any:
        return self.api
