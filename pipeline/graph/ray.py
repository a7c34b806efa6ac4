"""Starts or joins Ray, only when something needs it, and asks it for room for workers."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.graph.local_ray import start_local_ray
from pipeline.graph.resources import (
    Machine,
    Resources,
    Settings,
    WorkerGroup,
    amount_of,
    container_memory,
    cores_of,
    object_store_mb,
    team_of,
)
from pipeline.graph.stages import Context
from pipeline.progress import say_once
from pipeline.settings import RaySettings, TrainingSettings

log = logging.getLogger("unclip")
PLACING_S = 30.0  # for Ray to place workers on nodes that may be busy
HEAD_S = 5.0  # between two looks at a cluster's head
NODE_LABEL = "ray.io/node-id"  # by which Ray itself labels each node
BESIDE_S = 5.0  # the same beside workers that run, where it is asked again later
Asking = Mapping[str, tuple[TrainingSettings, int]]
"""The settings of stages, and how many workers each can use at most."""


@dataclass(frozen=True)
class ClusterNode:
    """Describes a machine of a cluster: its name and address, and the cores and GPUs that Ray may use."""

    host: str
    cpus: float
    gpus: float


def start_ray(settings: RaySettings) -> Any:
    """Joins the cluster that RAY_ADDRESS names, or starts one on this machine that ends with this process.

    The latter has no dashboard, listens on loopback, asks for a token that only its processes have, and keeps its files
    where no other user may enter.

    Returns:
        The ``ray`` module.

    Raises:
        UserError: The named cluster does not answer, or has another version of Ray or Python, or the Ray of this
            machine does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's core warns on the console about the actors of Ray Data, where the user can do nothing.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    # A thread that is still at work when Ctrl-C has ended Ray would start another one.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if _local():
        # As on macOS and Windows, a Ray of one machine then listens on loopback only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Only its processes know it; Ray's own token stands in a file that every user of the machine can read.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        return ray
    at_sigterm = signal.getsignal(signal.SIGTERM)
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
            raise UserError(f"the Ray cluster at {address} runs another version; install the same here: {told}") from e
        if not address.startswith("ray://"):  # a client is told by Ray itself
            threading.Thread(target=_watch_head, args=(ray,), name="watch the head", daemon=True).start()
    else:
        machine = this_machine(settings)
        with _without_log_lines():
            start_local_ray(
                ray,
                num_cpus=int(machine.cpus),
                num_gpus=int(machine.gpus),  # Ray by itself counts GPUs, too, that torch cannot use
                object_store_memory=object_store_mb(settings, machine) << 20,
                include_dashboard=False,
                **quiet,
            )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, at_sigterm)  # Ray ends the process there; its core prints its stack
    return ray


@contextmanager
def _without_log_lines() -> Iterator[None]:
    """Hides the line by which Ray's core says that it has read the level above. All else is passed on."""
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
    """Raises UserError if nobody listens at HOST:PORT, which Ray would find out after two minutes."""
    host, _, port = address.rpartition(":")
    if "/" in address or not port.isdecimal():  # ray://, http:// or "auto": for Ray to judge
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise UserError(
            f"no Ray cluster answers at {address} (RAY_ADDRESS): {e}; correct it, or unset it to start a local Ray"
        ) from e


def _watch_head(ray: Any) -> None:
    """Says in a line that a cluster's head does not answer, for which Ray ends this process after a silent minute.

    This one does not end it: a head with a store of its own may come back before.
    """
    address = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    gone = False
    while ray.is_initialized() and ray.get_runtime_context().gcs_address == address:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            gone = False
        except OSError as e:
            if not gone:
                log.error(
                    "the head of the Ray cluster at %s does not answer (%s); unless it comes back, Ray ends this "
                    "command in about a minute; then run the same command again: finished work is kept",
                    *(address, e),
                )
            gone = True
        time.sleep(HEAD_S)


def find_machine(settings: RaySettings) -> Machine:
    """Returns what there is to run on: this machine, or the cluster that RAY_ADDRESS names, which it joins."""
    return this_machine(settings) if _local() else _machine(start_ray(settings), settings)


def uses_ray(own: Settings, settings: RaySettings) -> bool:
    """Returns whether a stage runs in workers of Ray, not in this process, as trainings on a CPU do."""
    return own.workers != 0 and (own.workers != "auto" or team_of(own, find_machine(settings)).count > 0)


def this_machine(settings: RaySettings) -> Machine:
    """Returns this machine, with the cores that its own Ray may use and the GPUs that torch can use."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = torch.cuda.get_device_name(0) if gpus else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(cores_of(settings), gpus, name, min(memory, container_memory() or memory))


def _machine(ray: Any, settings: RaySettings, left_out: Collection[str] = ()) -> Machine:
    total, grows = Counter(ray.cluster_resources()), _grows(settings)
    for node in ray.nodes() if left_out else ():
        if node["Alive"] and node["NodeID"] in left_out:
            total.subtract(node["Resources"])
    kind = next((name for name in total if name.startswith("accelerator_type:")), "").partition(":")[2]
    gpus = max(total.get("GPU", 0), int(grows))  # an autoscaler may have a node with a GPU, which has to be asked for
    return Machine(total.get("CPU", 0), gpus, kind, total.get("memory", 0), _local(), grows)


def on_a_gpu(work: Callable[[Context], Artifact], ctx: Context) -> Artifact:
    """Returns ``work(ctx)``, which a node of the cluster does where this process has no GPU and the cluster has one."""
    import torch

    if _local() or torch.cuda.is_available():
        return work(ctx)
    ray = start_ray(ctx.ray)
    if not ray.cluster_resources().get("GPU", 0):
        return work(ctx)
    log.info("%s: on a GPU of the cluster", ctx.stage)
    there = ray.remote(num_cpus=0, num_gpus=1)(lambda own: work(own)).remote(replace(ctx, show=None))
    ray.wait([there])
    made = _answer(ray, there)
    if isinstance(made, Exception):
        raise made
    return made


def ask_every_node(ray: Any, question: Callable[[], Any], timeout_s: float) -> list[tuple[ClusterNode, Any]]:
    """Returns the answers of all living nodes to ``question``; where a node gives none, the exception that says why."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(lambda: question())
    asked = []
    for node in (node for node in ray.nodes() if node["Alive"]):
        name, has = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", node["Resources"]
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answer = ask.options(scheduling_strategy=there).remote()
        asked.append((ClusterNode(name, has.get("CPU", 0), has.get("GPU", 0)), answer))
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


def check_room(ray: Any, stages: Mapping[str, Settings], settings: RaySettings) -> None:
    """Raises UserError for the first of these stages whose workers Ray cannot place now.

    An autoscaler is asked for nothing before a stage has come to its turn, so its nodes do not wait for work.
    """
    if not _grows(settings):
        for stage, own in stages.items():
            team = find_team(ray, stage, own, settings)
            if not place(team):
                raise _refusal(ray, stage, team)


def wait_for_room(
    ray: Any,
    stage: str,
    own: Settings,
    settings: RaySettings,
    most: int = sys.maxsize,
    left_out: Collection[str] = (),
) -> WorkerGroup:
    """Returns the workers that a stage can have; logs the resources that a cluster lacks, and keeps waiting for them.

    A lost node may come back, and on this machine other stages end. ``most`` bounds the workers by the work that there
    is. Nodes ``left_out``, by Ray's id, are used only where the others have no room.

    Raises UserError where the Ray of this machine is too small.
    """
    if left_out and not _local():
        others = _without(ray, own, settings, most, left_out)
        if others is not None and place(others):
            return others
        log.warning("%s: uses excluded machines again, because the others have no room for its workers", stage)
    whom, told = "the stages that run" if _local() else "nodes that have it", None
    # A cluster counts a lost node for a while, in which "auto" is too many workers: it is worked out again each time.
    while not place(team := find_team(ray, stage, own, settings, most)):
        if team != told:
            log.warning("%s; waiting for %s", _lacking(ray, stage, team), whom)
            told = team
        if not _local() and own.workers != "auto":  # what starts these workers waits for them
            break
    return team


def _without(
    ray: Any, own: Settings, settings: RaySettings, most: int, left_out: Collection[str]
) -> WorkerGroup | None:
    """Returns the workers that a stage can have on other nodes than these, all of them; None if too few fit there."""
    team = team_of(own, _machine(ray, settings, left_out), most)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in left_out]
    count = min(team.count, sum(map(team.worker.places, nodes)))
    if count < max(1, team.least):
        return None
    labels = {**team.worker.labels, NODE_LABEL: f"!in({','.join(sorted(left_out))})"}
    return replace(team, count=count, least=count, worker=replace(team.worker, labels=labels))


def room_beside(stages: Asking, running: Asking, settings: RaySettings) -> list[str]:
    """Returns those of some stages whose workers Ray has room for at once, beside all that it runs now.

    A stage that works in this process is none of them, nor is one that takes every core of this machine, where such
    stages would take turns. Where an autoscaler adds nodes, every stage has room. On this machine none has while
    workers of a stage that is ``running`` have yet to start.
    """
    ray = start_ray(settings)
    if _local():
        teams = [find_team(ray, stage, own, settings, most) for stage, (own, most) in running.items()]
        has, free = ray.cluster_resources(), ray.available_resources()
        for name, taken in (
            ("CPU", sum(team.count * team.worker.cpus for team in teams)),
            ("GPU", sum(team.count * team.worker.gpus for team in teams)),
        ):
            if has.get(name, 0) - free.get(name, 0) < taken:
                return []
    reserved: list[Resources] = []
    found = []
    for stage, (own, most) in stages.items():
        team = find_team(ray, stage, own, settings, most)
        if team.count == 0 or (_local() and not team.worker.gpus and not own.threads):
            continue
        more = [*reserved, *[team.worker] * team.count]
        if _grows(settings) or _reserve(more, BESIDE_S):
            reserved = more
            found.append(stage)
    return found


def find_team(ray: Any, stage: str, own: Settings, settings: RaySettings, most: int = sys.maxsize) -> WorkerGroup:
    """Returns the workers that a stage can have, by its settings; at most ``most``.

    The Ray of this machine runs no more of them than it has room for. So does a cluster without an autoscaler where
    workers have helpers, because workers that take the helpers' cores would wait forever. Raises UserError where the
    Ray of this machine has too little room.
    """
    team = team_of(own, _machine(ray, settings), most)
    if not _local() and (_grows(settings) or not (team.helpers and team.firm)):
        return team
    found = team.room(ray.cluster_resources())
    if _local() and found < team.least:
        raise _refusal(ray, stage, team)
    if not 0 < found < team.count:
        return team
    if own.workers != "auto":
        say_once(f"run.{stage}.workers: {team.count} requested, with room for {found}; continuing with {found}")
    return replace(team, count=found)


def _local() -> bool:
    return not os.environ.get("RAY_ADDRESS")


def _grows(settings: RaySettings) -> bool:
    return settings.autoscaler and not _local()


def _refusal(ray: Any, stage: str, team: WorkerGroup) -> UserError:
    advice = f"add such nodes, or ask for less under run.{stage}; where an autoscaler adds them, set run.ray.autoscaler"
    if _local():
        advice = f"ask for less under run.{stage}, raise run.ray.cpus, or set RAY_ADDRESS to a cluster"
    return UserError(f"{_lacking(ray, stage, team)}; {advice}")


def place(team: WorkerGroup) -> bool:
    """Returns whether Ray can reserve now what the workers need, all of those with helpers; gives it back at once."""
    helpers = team.helpers if team.firm else 0
    workers = team.count if helpers else team.least
    return _reserve([team.worker] * workers + [team.helper] * (workers * helpers), PLACING_S)


def _reserve(shares: Sequence[Resources], seconds: float) -> bool:
    """Returns whether Ray can reserve all of these within some seconds; gives them back at once."""
    from ray.util import placement_group, remove_placement_group

    labels = [dict(share.labels) for share in shares]
    group = placement_group([share.by_name for share in shares], bundle_label_selector=labels if any(labels) else None)
    try:
        return group.wait(seconds)
    finally:
        remove_placement_group(group)


def _lacking(ray: Any, stage: str, team: WorkerGroup) -> str:
    """Returns what Ray cannot place, and what it has: "codec: Ray has no room for 2 workers with 1 GPU each ..."."""
    total = ray.cluster_resources()
    has = f"{amount_of(total.get('CPU', 0), 'core')} and {amount_of(total.get('GPU', 0), 'GPU')}"
    return f"{stage}: Ray has no room for {team}; it has {has}, {int(total.get('memory', 0)) >> 20:,} MiB for workers"
