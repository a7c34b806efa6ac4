"""Ray, started once and only when something needs it."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.settings import RaySettings


@dataclass(frozen=True)
class Node:
    """A machine of a cluster: its name and address, and what Ray may use of it."""

    host: str
    cpus: float
    gpus: float


def start_ray(settings: RaySettings) -> Any:
    """Join the cluster that RAY_ADDRESS names, or start one in this machine that ends with this process.

    That one has no dashboard, listens on loopback, and asks for a token that only its processes have.

    Returns the ``ray`` module. Raises UserError if the named cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's core warns on the console of what Ray Data does with its own actors; nobody here can act on it.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    if "RAY_ADDRESS" not in os.environ:
        # What it also does on laptops with macOS or Windows: a Ray of one machine listens on loopback only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Known to its processes alone; Ray's own stands in a file that every user of the machine can read.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        return ray
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _reach(address)
        try:
            with _without_log_lines():
                ray.init(address=address, **quiet)
        except (ConnectionError, ValueError) as e:
            raise UserError(f"no Ray cluster answers at {address} (RAY_ADDRESS): {str(e).splitlines()[0]}") from e
    else:
        with _without_log_lines():
            ray.init(
                address="local",
                num_cpus=settings.cpus,
                object_store_memory=settings.object_store_mb << 20,
                include_dashboard=False,
                **quiet,
            )
    return ray


@contextmanager
def _without_log_lines() -> Iterator[None]:
    """Ray's core says on the console that it has read the level above, before it heeds it. All else is passed on."""
    sys.stderr.flush()
    console = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(console, 2)
            os.close(console)
            file.seek(0)
            for line in file:
                if b" logging.cc:" not in line:
                    os.write(2, line)


def _reach(address: str) -> None:
    """Raise UserError if nobody listens at HOST:PORT, of which Ray would take two minutes to be sure."""
    host, _, port = address.rpartition(":")
    if "/" in address or not port.isdecimal():  # ray://, http:// or "auto": for Ray to judge
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise UserError(
            f"no Ray cluster answers at {address} (RAY_ADDRESS): {e}; correct it, or unset it to start a Ray here"
        ) from e


def ask_every_node(settings: RaySettings, question: Callable[[], Any], timeout_s: float) -> list[tuple[Node, Any]]:
    """Start or join Ray, call ``question`` on every living node, and leave Ray.

    A node that gives no answer has the exception that says why. Raises UserError as ``start_ray`` does.
    """
    ray = start_ray(settings)
    try:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ask = ray.remote(num_cpus=0, max_retries=0)(lambda: question())
        asked = []
        for node in ray.nodes():
            if node["Alive"]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
                found = Node(name, node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
                asked.append((found, ask.options(scheduling_strategy=there).remote()))
        ray.wait([answer for _, answer in asked], num_returns=len(asked), timeout=timeout_s)
        return [(node, _answer(ray, answer)) for node, answer in asked]
    finally:
        ray.shutdown()


def _answer(ray: Any, answer: Any) -> Any:
    try:
        return ray.get(answer, timeout=0)
    except ray.exceptions.RayTaskError as e:
        return e.cause if isinstance(e.cause, Exception) else e
    except ray.exceptions.RayError as e:
        return e
