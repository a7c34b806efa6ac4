"""Ray, started once and only when something needs it, and what its nodes have."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

from pipeline.errors import UserError
from pipeline.graph.resources import Node, Settings, Team, lacking, room, team_of
from pipeline.settings import RaySettings

log = logging.getLogger("unclip")
AUTOSCALER_S = 15.0  # after which an autoscaler that has said nothing of itself is taken for one
AUTOSCALING_STATUS = "__autoscaling_status"  # the monitor on the head writes it every five seconds


def start_ray(settings: RaySettings) -> Any:
    """Join the cluster that RAY_ADDRESS names, or start one in this machine that ends with this process.

    That one has no dashboard, listens on loopback, and asks for a token that only its processes have.

    Returns the ``ray`` module. Raises UserError if the named cluster does not answer, or has another version of Ray or
    Python, and if temporary files are where no Ray can be.
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
        except RuntimeError as e:
            if not str(e).startswith("Version mismatch"):
                raise
            told = " ".join(str(e).split()).removeprefix("Version mismatch: ")
            raise UserError(f"the Ray cluster at {address} is another version; install the same here: {told}") from e
    else:
        try:
            with _without_log_lines():
                ray.init(
                    address="local",
                    num_cpus=settings.cpus,
                    object_store_memory=settings.object_store_mb << 20,
                    include_dashboard=False,
                    **quiet,
                )
        except OSError as e:
            if "AF_UNIX" not in str(e):
                raise
            raise UserError(
                "the folder of temporary files (TMPDIR) has too long a name for Ray, whose sockets lie there under "
                f"names of at most 107 bytes; set RAY_TMPDIR=/tmp ({e})"
            ) from e
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


def living_nodes(ray: Any) -> list[tuple[str, Node]]:
    """The nodes of the cluster, each after its id."""
    return [
        (
            node["NodeID"],
            Node(
                f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
                node["Resources"].get("CPU", 0),
                node["Resources"].get("GPU", 0),
                node["Resources"].get("memory", 0),
                node["Labels"] or {},
            ),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def count_gpus(settings: RaySettings, here: bool) -> float:
    """Returns how many GPUs there are: those that torch can use ``here``, or on a cluster those of all its nodes."""
    if here or "RAY_ADDRESS" not in os.environ:
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return sum(node.gpus for _, node in living_nodes(start_ray(settings)))


def ask_every_node(ray: Any, question: Callable[[], Any], timeout_s: float) -> list[tuple[Node, Any]]:
    """Call ``question`` on every living node. A node that gives no answer has the exception that says why."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(lambda: question())
    asked = [
        (node, ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote())
        for name, node in living_nodes(ray)
    ]
    ray.wait([answer for _, answer in asked], num_returns=len(asked), timeout=timeout_s)
    return [(node, _answer(ray, answer)) for node, answer in asked]


def _answer(ray: Any, answer: Any) -> Any:
    try:
        return ray.get(answer, timeout=0)
    except ray.exceptions.RayTaskError as e:
        return e.cause if isinstance(e.cause, Exception) else e
    except ray.exceptions.RayError as e:
        return e


# --- room -------------------------------------------------------------------------------------------------------------


def find_room(ray: Any, stages: Mapping[str, Settings], refuse: bool = False) -> dict[str, Team]:
    """The workers that each of these stages can have, by the settings of its stage.

    On the Ray of this machine there are no more of them than there is room for. So it is on a cluster without
    autoscaler for workers that need helpers, which would keep each other from starting; others wait there for room.
    Raises UserError that names all that can never run: always on the Ray of this machine, and with ``refuse`` on a
    cluster without autoscaler; without ``refuse``, and where an autoscaler runs, it is waited for. A node that was lost
    may come back.
    """
    local = "RAY_ADDRESS" not in os.environ
    nodes = [node for _, node in living_nodes(ray)]
    teams = {stage: team_of(settings, nodes, local) for stage, settings in stages.items()}
    if faults := [fault for stage, team in teams.items() if (fault := lacking(stage, team, nodes))]:
        told = "; ".join(faults)
        if local:
            raise UserError(
                f"too little for what is asked of the Ray of this machine: {told}; lower it under run, raise "
                "run.ray.cpus, or set RAY_ADDRESS to a cluster (ray start --labels gives its nodes labels)"
            )
        if refuse and not may_grow(ray):
            raise UserError(
                f"what the cluster can never run: {told}; add such nodes, or ask for less under run, and start again"
            )
        log.warning("%s; waiting for nodes that have it", told)
    return {stage: _fitted(ray, stage, team, nodes, local) for stage, team in teams.items()}


def _fitted(ray: Any, stage: str, team: Team, nodes: list[Node], local: bool) -> Team:
    found = room(team, nodes)
    if not 0 < found < team.count or not (local or (team.helpers and not may_grow(ray))):
        return team
    say_once(f"run.{stage}.workers: {team.count} are asked for, and there is room for {found}; going on with {found}")
    return replace(team, count=found)


@cache  # a stage of many passes says it once
def say_once(text: str) -> None:
    log.info(text)


def may_grow(ray: Any) -> bool:
    """Whether the cluster has an autoscaler, which may add nodes.

    The monitor of the head says of what types its nodes are. Where it only watches, each is a type of its own. A head
    that has just begun says nothing for some seconds; one that says nothing at all may have its autoscaler elsewhere.
    """
    from ray.experimental.internal_kv import _internal_kv_get

    end = time.monotonic() + AUTOSCALER_S
    while True:
        report = json.loads(_internal_kv_get(AUTOSCALING_STATUS) or "{}").get("autoscaler_report") or {}
        if types := {*(report.get("node_type_mapping") or {}).values()}:
            return not types <= {f"node_{node['NodeID']}" for node in ray.nodes()}
        if time.monotonic() > end:
            return True
        time.sleep(0.5)
