"""The processes of Ray Serve: one door that speaks HTTP and holds the line, and processes that draw."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event as Flag
from threading import Thread
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, TaskCancelledError
from ray.serve.handle import DeploymentHandle

from pipeline.errors import UserError
from pipeline.graph.ray import start_ray
from pipeline.parse import parse
from pipeline.sampling.drawing import refusals
from pipeline.settings import RaySettings
from serve.api import make_api
from serve.bundle import Served, read_head
from serve.gateway import Gateway
from serve.guard import read_tokens
from serve.metrics import Metrics
from serve.model_runner import ModelRunner, Stopped
from serve.queue import Died, Event, Refused, RequestQueue
from serve.results import Results
from serve.settings import ServeSettings
from serve.work import Work

APP = "unclip"
SELDOM_S = 600.0  # between two looks at a release that cannot be loaded
UPSCALE_S = 5.0  # that a batch waits for a process before another one starts
CONNECTIONS = 1000  # requests that the door holds at once, waiting ones among them
PORTS = 3  # free ones that are tried
PROXY = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20"}  # a third of what a proxy has to start in, before it is killed
HEAD = {"node:__internal_head__": 0.001}  # where Serve's own processes are: the end of another node ends nobody's wait
GONE = (RayActorError, ObjectLostError, TaskCancelledError)
log = logging.getLogger("unclip")


class Replica:
    """A process that holds the bundle and draws one batch at a time. A new release is loaded beside the old one."""

    def __init__(self, served: Served, settings: ServeSettings):
        logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
        self.served, self.settings = served, settings
        self.painter = self._open(served.current())
        self.next: ModelRunner | None = None
        self.warning = ""
        self.thread = ThreadPoolExecutor(1)
        if not served.key:
            Thread(target=self._follow, daemon=True).start()

    def _open(self, key: str) -> ModelRunner:
        unclip, settings = self.served.open(key, self.settings.device), self.settings
        judges = {
            what: (read_head(path, unclip.clip.embed_dim), most)
            for what, path, most in (
                ("prompt", settings.prompt_head, settings.most_prompt),
                ("image", settings.image_head, settings.most_image),
            )
            if path
        }
        if unclip.clip.mean.device.type == "cpu":
            torch.set_num_threads(settings.cpus)  # other processes draw on the other cores
        painter = ModelRunner(key, unclip, settings.batch, judges)
        painter.warm_up()
        return painter

    def _follow(self) -> None:
        """Loads every new release, for the next batch to be drawn with.

        One that cannot be loaded changes nothing, and is tried again, ever more seldom.
        """
        seen, pause = self.painter.key, self.settings.follow_s
        while True:
            Flag().wait(pause)
            try:
                key = self.served.current()
                if key != seen:
                    self.next, seen = self._open(key), key
                    log.info("bundle %s is served from the next request on", key[:12])
                self.warning, pause = "", self.settings.follow_s
            except Exception as e:  # whatever is wrong with the new one, the old one goes on
                pause = min(2 * pause, max(SELDOM_S, pause))
                self.warning = "the release could not be loaded, and the one before goes on: see the log"
                log.warning("bundle %s goes on: the release could not be loaded (%s)", self.painter.key[:12], e)

    def _switch(self) -> None:
        if self.next is not None:
            self.painter, self.next = self.next, None

    async def describe(self) -> dict[str, Any]:
        """Returns what this process draws with."""
        self._switch()
        return self.painter.describe() | {"warning": self.warning}

    async def draw(self, work: Work) -> AsyncGenerator[Event]:
        """Yields ("bundle", its description), then the events of ``ModelRunner.draw``, or ("refused", why)."""
        self._switch()
        painter, loop, stop = self.painter, asyncio.get_running_loop(), Flag()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def emit(event: Event | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def run() -> None:
            try:
                with refusals():
                    painter.draw(work, emit, stop.is_set)
            except Stopped:
                pass
            except UserError as e:
                log.warning("%s was refused: %s", work.kind, e)
                emit(("refused", str(e)))
            finally:
                emit(None)

        drawing = loop.run_in_executor(self.thread, run)
        try:
            yield ("bundle", painter.describe() | {"warning": self.warning})
            while (event := await events.get()) is not None:
                yield event
            await drawing
        finally:
            stop.set()


class DoorProcess:
    """The process that speaks HTTP."""

    def __init__(self, drawers: DeploymentHandle, served: Served, settings: ServeSettings, tokens: Mapping[str, str]):
        logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
        stream = drawers.options(stream=True)

        async def draw(work: Work) -> AsyncGenerator[Event]:
            response: Any = stream.draw.remote(work)
            try:
                async for event in response:
                    if event[0] == "refused":
                        raise Refused(event[1])
                    yield event
            except GONE as e:
                raise Died(type(e).__name__) from None
            finally:
                response.cancel()

        async def ask() -> dict[str, Any]:
            try:
                return await drawers.describe.remote()
            except GONE as e:
                raise Died(type(e).__name__) from None

        self.metrics = Metrics()
        line = RequestQueue(
            draw, settings.replicas, settings.batch, settings.queue, settings.wait_ms / 1000, self.metrics
        )
        self.tokens = tokens
        self.door = Gateway(served, settings, line, Results(settings.results_mb << 20), ask, self.metrics)

    def __serve_build_asgi_app__(self) -> Any:
        return make_api(self.door, self.tokens, self.metrics.text)


def build(served: Served, settings: ServeSettings, tokens: Mapping[str, str]) -> serve.Application:
    """Returns the application of Ray Serve."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(machine.get("CPU", 0)) for machine in machines]
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    gpu = settings.device == "cuda" or (settings.device == "auto" and gpus > 0)
    if gpu and not gpus and not os.environ.get("RAY_ADDRESS"):  # and a cluster may add nodes
        raise UserError("serve: device=cuda, but Ray finds no GPU on this machine; leave device out")
    asked, settings = settings.replicas, sized(settings, cores, gpus if gpu else None)
    # All that are there already; those that a cluster may have to add come when they are needed.
    first = max(1, settings.idle_replicas) if asked else settings.replicas
    drawers: Any = serve.deployment(
        Replica,
        name="drawer",
        max_ongoing_requests=1,
        ray_actor_options={"num_gpus": 1} if gpu else {"num_cpus": settings.cpus},
        autoscaling_config={
            "min_replicas": settings.idle_replicas,
            "initial_replicas": first,
            "max_replicas": settings.replicas,
            "target_ongoing_requests": 1,
            "upscale_delay_s": UPSCALE_S,
            "downscale_delay_s": settings.idle_s,
        },
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=60,
    )
    door: Any = serve.deployment(
        serve.ingress()(DoorProcess),
        name="door",
        max_ongoing_requests=CONNECTIONS,
        ray_actor_options={"num_cpus": 0, "resources": HEAD},
    )
    return door.bind(drawers.bind(served, settings), served, settings, tokens)


def sized(settings: ServeSettings, cores: Sequence[int], gpus: int | None) -> ServeSettings:
    """Returns the settings with the number of processes, and of cores for each, as many as leave room for all.

    Args:
        settings: What is asked for; 0 leaves it to this.
        cores: Of each machine.
        gpus: Of all machines; None draws on cores.
    """
    fitting = min(2, sum(each // (settings.cpus or 1) for each in cores)) if gpus is None else gpus
    replicas = max(settings.replicas or fitting, 1, settings.idle_replicas)
    shares = (n for n in range(max(cores), 1, -1) if sum(each // n for each in cores) >= replicas)
    return replace(settings, replicas=replicas, cpus=settings.cpus or next(shares, 1))


def application(arguments: Mapping[str, Any]) -> serve.Application:
    """Returns the application where Ray Serve builds it from a file, as KubeRay's RayService does."""
    settings = parse(ServeSettings, arguments["settings"], "serve")
    return build(Served(**arguments["served"]), settings, read_tokens(settings))


def hold(served: Served, settings: ServeSettings, tokens: Mapping[str, str]) -> None:
    """Serves until this process is told to end, and says where as soon as the first image could be drawn.

    What it started ends with it, and nothing else on its cluster; requests that were accepted are answered first.
    Raises UserError where the cluster serves at another address already.
    """
    if settings.port and not os.environ.get("RAY_ADDRESS"):
        settings = _with_port(settings)
    start_ray(RaySettings())
    print(f"loading {served.name} ...", flush=True)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    settings = _start_serve(settings)
    client: Any = serve.context._get_global_client()
    http = client.http_config
    if (http.host, http.port) != (settings.host, settings.port):
        raise UserError(
            f"Ray Serve listens at {http.host}:{http.port} of this cluster already: ask for that by host= and port=, "
            "or end it there with serve shutdown"
        )
    if APP in serve.status().applications:
        raise UserError("this cluster serves a bundle already: end that first, or serve from another cluster")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        try:
            serve.run(build(served, settings, tokens), name=APP, route_prefix="/")
        except RuntimeError as e:
            application = serve.status().applications.get(APP)
            said = "\n".join(each.message for each in application.deployments.values()) if application else ""
            if mistakes := re.findall(r"\bpipeline\.errors\.(\w+): (.*)", said):
                kind, why = mistakes[-1]  # those before it are its causes
                raise UserError(f"{why}; check the disk or the bucket" if kind == "CorruptObject" else why) from e
            log.error("%s", said)
            raise
        host = named(settings.host)
        url = f"http://{host}:{settings.port}"
        print(f"the studio is at {url}/, the API at {url}/v1", flush=True)
        if os.environ.get("RAY_ADDRESS"):
            to_here = f"{settings.port}:{host}:{settings.port}"
            print(f"on the cluster's head, that is: ssh -L {to_here} HEAD brings it here", flush=True)
        Flag().wait()
    finally:
        serve.delete(APP)


def named(host: str) -> str:
    """Returns how an address is told from this machine that listens at ``host``, as a URL has it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _start_serve(settings: ServeSettings) -> ServeSettings:
    """Starts Ray Serve, unless its cluster has it already, and returns the settings with the port that it listens at.

    Another process may take a port that was free a moment ago, so for port 0 another one is tried. Raises UserError.
    """
    there = serve.context._get_global_client(raise_if_no_controller_running=False)
    for _ in range(PORTS):
        tried = settings if settings.port else _with_port(settings)
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": tried.host, "port": tried.port, "keep_alive_timeout_s": 65},
                logging_config={"log_level": "ERROR", "enable_access_log": False},
                controller_options={"runtime_env": {"env_vars": PROXY}},
            )
            return tried
        except (RayActorError, TimeoutError) as e:
            if there is None:
                serve.shutdown()
            why = (str(e).splitlines() or ["no answer"])[0]
            raise UserError(
                f"serve: Ray Serve did not listen within a minute; is the machine, or the head, busy? ({why})"
            ) from e
        except RayTaskError as e:
            if there is None:  # else it is somebody else's
                serve.shutdown()
            said = str(e.cause).rstrip(".")
            if "Failed to bind" not in said:
                raise
            if settings.port:
                break
    raise UserError(f"serve: {said}; name another by port=")


def _with_port(settings: ServeSettings) -> ServeSettings:
    """Returns the settings with their port, or any that is free for 0.

    Raises UserError if it is taken: Ray Serve would share it.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.create_server((settings.host, settings.port), family=family) as server:
            return replace(settings, port=server.getsockname()[1])
    except OSError as e:
        raise UserError(
            f"serve: {settings.host}:{settings.port} cannot be listened at ({e.strerror}); name another by port="
        ) from None
