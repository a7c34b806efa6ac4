"""Replicas in processes of Ray, one a GPU or share of a machine's cores, on any node of its cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import UserError
from serve.bundle import ServedBundle
from serve.queue import Event, ReplicaDied
from serve.replica import Replica
from serve.settings import ServeSettings
from serve.work import Work


class ReplicaProcess:
    """An actor that holds a replica. Its event loop answers while a thread loads and draws."""

    def __init__(self) -> None:
        logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)

    async def load(self, served: ServedBundle, settings: ServeSettings) -> tuple[int, str]:
        """Loads the bundle. Returns the process's id and that of its node."""
        self.replica = await asyncio.to_thread(Replica, served, settings)
        return os.getpid(), ray.get_runtime_context().get_node_id()

    async def describe(self) -> dict[str, Any]:
        """Returns what is drawn with."""
        return await self.replica.describe()

    async def draw(self, work: Work) -> AsyncGenerator[Event]:
        """Yields the events of drawing until it is cancelled."""
        async with aclosing(self.replica.draw(work)) as events:
            async for event in events:
                yield event


class RemoteReplica:
    """The gateway's handle of a ``ReplicaProcess``."""

    def __init__(self, actor: Any, pid: int, node: str):
        self.actor, self.pid, self.node = actor, pid, node

    @classmethod
    async def start(cls, served: ServedBundle, settings: ServeSettings, gpu: bool) -> RemoteReplica:
        """Starts a process, waits until Ray has room for it and it has loaded the bundle. Raises UserError."""
        share: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if gpu else {"num_cpus": settings.cpus}
        actor: Any = ray.remote(ReplicaProcess)
        # More than one call at once: pings are answered while a batch draws.
        actor = actor.options(max_concurrency=100, **share).remote()
        try:
            return cls(actor, *await actor.load.remote(served, settings))
        except RayTaskError as e:
            raise e.cause from e
        except RayError as e:
            raise UserError(f"a process that loads the bundle ended: {str(e).splitlines()[0]}") from e

    async def describe(self) -> dict[str, Any]:
        """Returns what is drawn with. Raises ReplicaDied."""
        try:
            return await self.actor.describe.remote()
        except RayError as e:
            raise ReplicaDied(type(e).__name__) from None

    async def draw(self, work: Work) -> AsyncGenerator[Event]:
        """Yields the events of drawing. Raises ReplicaDied, RequestRefused, and what went wrong."""
        drawing = self.actor.draw.options(num_returns="streaming").remote(work)
        try:
            async for answer in drawing:
                yield await answer
        except RayTaskError as e:
            raise e.cause from e
        except RayError as e:
            raise ReplicaDied(type(e).__name__) from None
        finally:
            ray.cancel(drawing)  # for one that has ended it does nothing

    async def close(self) -> None:
        """Ends the process."""
        await asyncio.to_thread(ray.kill, self.actor)

    async def kill(self) -> None:
        """Ends the process by SIGKILL, as it may be stopped or hang: ``ray.kill`` asks it to end itself."""
        if self.node == ray.get_runtime_context().get_node_id():
            _kill(self.pid)
        else:
            there = NodeAffinitySchedulingStrategy(self.node, soft=False)
            with suppress(RayError):
                await ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(self.pid)
        await asyncio.to_thread(ray.kill, self.actor)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def fit_replicas(settings: ServeSettings, cores: Sequence[int], gpus: int | None) -> ServeSettings:
    """Returns the settings with the number of replicas, and of cores for each, as many as leave room for all.

    Args:
        settings: Settings as given; a number of replicas or of cores that is 0 is chosen here.
        cores: Cores of each machine.
        gpus: GPUs of all machines together; None draws on cores.
    """
    replicas = max(settings.replicas or gpus or 1, settings.idle_replicas)
    shares = (n for n in range(max(cores, default=1), 1, -1) if sum(each // n for each in cores) >= replicas)
    return replace(settings, replicas=replicas, cpus=settings.cpus or next(shares, 1))


def fit_to_cluster(settings: ServeSettings) -> tuple[ServeSettings, bool]:
    """Returns the settings as the cluster's machines have room for them, and whether replicas have a GPU.

    Raises UserError for a GPU that this machine lacks; a cluster may add nodes.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    gpu = settings.device == "cuda" or (settings.device == "auto" and gpus > 0)
    if gpu and not gpus and not os.environ.get("RAY_ADDRESS"):
        raise UserError("serve: device=cuda, but Ray finds no GPU on this machine; leave device out")
    return fit_replicas(settings, [int(machine.get("CPU", 0)) for machine in machines], gpus if gpu else None), gpu
