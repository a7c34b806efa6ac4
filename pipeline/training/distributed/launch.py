"""Starts the workers of a training: this process, or Ray workers by Ray Train. Only this module of a training uses Ray.

Ray Train starts the workers, joins them in a process group and watches them. It neither saves nor resumes: a worker
that starts reads the newest checkpoint from the store.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch.distributed import DistError

from pipeline.errors import CorruptObject, Superseded, UserError
from pipeline.graph.device import OutOfMemory, choose_device
from pipeline.graph.local_ray import local_logs, ray_logs
from pipeline.graph.ray import start_ray, uses_ray, wait_for_room
from pipeline.graph.resources import cores
from pipeline.settings import RaySettings, TrainingSettings
from pipeline.training.distributed.heartbeats import BEAT_S, DONE, STILL_S, Heartbeats
from pipeline.training.distributed.process_group import CHECK_EVERY, HUNG_S, LONG_S, ProcessGroup

ANSWER_S = 30.0  # for heartbeats: without an answer the next one says the same
REPORT_EVERY_S = 30.0  # a report waits up to two seconds for the controller's next poll
LISTEN_EVERY_S = 5.0  # all workers wait for each other when they ask whether a machine is to be taken away
LOGS, LOG_LINES, LOG_S = 4, 1000, 10  # of how many lost workers a log is read, its lines, how long it is asked for
# Ray's text on a dead actor names its process; where Ray Train's poll finds the connection lost before Ray knows of the
# death, only Ray Train's own text on the worker does.
DIED = re.compile(
    r"\bpid: (?P<pid>\d+)\b.*?\bip: (?P<ip>\S+)|\bnode_ip='(?P<node_ip>[^']+)',\s+pid=(?P<node_pid>\d+)", re.DOTALL
)
LONGEST_REASON = 400  # characters
NCCL_ERROR = re.compile(r"NCCL WARN|NCCL error|Watchdog caught|\bnccl\w*Error\b")
# CUDA's words for faults of a machine and not of a program.
BROKEN_GPU = re.compile(r"uncorrectable (ECC|NVLink) error[^\n]*|hardware stack error|GPU is lost|fallen off the bus")
log = logging.getLogger("unclip")
EXPECTED = (UserError, Superseded, CorruptObject, OutOfMemory)


class WorkerLost(Exception):
    """Says that a worker or its machine died, or hung. The training can go on from its newest checkpoint.

    ``bad`` are the addresses of machines, by Ray's id, that the next attempt had better do without; ``died`` is the
    machine on which workers died, if it is one of several.
    """

    def __init__(
        self, why: str, bad: Mapping[str, str] = MappingProxyType({}), died: Mapping[str, str] = MappingProxyType({})
    ):
        super().__init__(why)
        self.bad, self.died = bad, died


class Relayed(Exception):
    """Carries an expected error to the driver as its only argument: Ray would wrap it in errors of its own kinds."""


def launch(
    work: Callable[[ProcessGroup], None],
    stage: str,
    name: str,
    settings: TrainingSettings,
    ray_settings: RaySettings,
    most: int = sys.maxsize,
    left_out: Collection[str] = (),
) -> None:
    """Calls ``work`` in Ray workers, or in this process, and waits for all of them.

    With ``settings.min_workers`` it begins with as many workers as there are cores or GPUs for, and Ray Train starts
    ``work`` again when more come, and after a notice that a machine is taken away.

    Args:
        work: Function that each worker calls.
        stage: Stage, named in messages.
        name: Name of the run, new for every call: Ray Train would resume an old one.
        settings: Settings, with the number of workers.
        ray_settings: Settings of the Ray that is started or joined.
        most: Largest number of workers that the training can use.
        left_out: Ray's ids of machines to do without, as long as the others have room.

    Raises:
        WorkerLost: A worker died, or hung.
        UserError: Ray has too little room.
        Exception: What a worker raised, if it is one of EXPECTED.
    """
    if not uses_ray(settings, ray_settings):
        torch.set_num_threads(settings.threads or cores())
        work(ProcessGroup(device=choose_device(settings.device)))
        return
    ray = start_ray(ray_settings)
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    team = wait_for_room(ray, stage, settings, ray_settings, most, left_out)
    share, gpus = team.worker, team.worker.gpus > 0
    elastic = settings.min_workers and not share.labels  # Ray Train counts room on all nodes, whatever their labels
    asked: dict[str, Any] = {
        "num_workers": (settings.min_workers, team.count) if elastic else team.count,
        "use_gpu": gpus,
        "resources_per_worker": share.by_name,
        "label_selector": dict(share.labels) or None,
    }
    backend = "cpu:gloo,cuda:nccl" if gpus and settings.offload else None  # weights on the CPU are added up there
    # On this machine: it must not hang with a worker's.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    heartbeats = ray.remote(num_cpus=0, scheduling_strategy=here)(Heartbeats).remote(STILL_S)
    with tempfile.TemporaryDirectory(prefix="unclip-train-") as scratch, _watching(ray, stage, heartbeats):
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"work": work, "settings": settings, "heartbeats": heartbeats},
            torch_config=TorchConfig(backend, timeout_s=HUNG_S if gpus else LONG_S),
            scaling_config=ScalingConfig(**asked),
            run_config=RunConfig(name=name, storage_path=scratch, failure_config=FailureConfig(max_failures=0)),
        )
        try:
            trainer.fit()
        except WorkerGroupError as e:
            raise _blamed(ray, heartbeats, e.worker_failures) from e
        except TrainingFailedError as e:  # of starting the workers, or of watching them
            raise _cause([e]) from e


@contextmanager
def _watching(ray: Any, stage: str, heartbeats: Any) -> Iterator[None]:
    """Warns once of each worker that slows a training down, for as long as the context and ``heartbeats`` last."""
    over = threading.Event()

    def watch() -> None:
        named = set()
        while not over.wait(BEAT_S):
            with suppress(ray.exceptions.RayError):
                slow = ray.get(heartbeats.slow.remote(), timeout=ANSWER_S)
                if slow and (slow.rank, slow.host) not in named:
                    named.add((slow.rank, slow.host))
                    log.warning(
                        "%s: worker %d on %s is slow: the others wait for it for %.0f%% of each step",
                        *(stage, slow.rank, slow.host, 100 * slow.share),
                    )

    thread = threading.Thread(target=watch, daemon=True, name="slow workers")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        ray.kill(heartbeats)


@contextmanager
def _beating(heartbeats: Any, group: ProcessGroup) -> Iterator[None]:
    """Tells ``heartbeats`` how far this worker is for as long as the context lasts.

    Ends the process where the training stands still: the thread that trains may wait for ever.
    """
    import ray

    over, me = threading.Event(), ray.get_runtime_context().get_node_id()
    host = ray.util.get_node_ip_address()

    def beat() -> None:
        last = False
        while True:
            with suppress(ray.exceptions.RayError):
                told = heartbeats.beat.remote(group.rank, group.pulse.beat(group.size, me, host))
                if why := ray.get(told, timeout=ANSWER_S):
                    log.error(why)  # logging flushes each line, which os._exit does not
                    os._exit(1)
            if last:
                return
            last = over.wait(BEAT_S)

    thread = threading.Thread(target=beat, daemon=True, name="heartbeats")
    thread.start()
    try:
        yield
    finally:
        group.pulse.mark(DONE)
        over.set()
        thread.join()


def _worker(config: Mapping[str, Any]) -> None:
    """Runs one Ray worker. Raises Relayed for an error that the driver expects."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    settings: TrainingSettings = config["settings"]
    # Ray lowers OMP_NUM_THREADS in its workers.
    torch.set_num_threads(settings.threads or max(1, cores() // context.get_local_world_size()))
    os.environ.setdefault("NCCL_DEBUG", "WARN")  # else it says of an error that it was one
    size = context.get_world_size()
    device = ray.train.torch.get_device()
    torch.backends.cudnn.allow_tf32 = False  # as choose_device does
    try:
        watcher = Watcher(size, device)
        rank = context.get_world_rank()
        node = context.get_node_rank()
        group = ProcessGroup(rank, size, device, node, watcher.report, lambda: watcher.leaving, lambda: watcher.steps)
        with _beating(config["heartbeats"], group):
            config["work"](replace(group, sharded=settings.sharded, offload=settings.offload))
    except EXPECTED as e:
        raise Relayed(e) from None


def _blamed(ray: Any, heartbeats: Any, failures: Mapping[int, Exception]) -> Exception:
    """Returns the error to raise where workers failed, by rank, with the machines that are to blame."""
    died: dict[str, str] = {}
    with suppress(ray.exceptions.RayError):
        if hung := ray.get(heartbeats.hung.remote(), timeout=ANSWER_S):
            return WorkerLost(hung.why, hung.hosts)
        for rank, failure in failures.items():
            host = ray.get(heartbeats.host.remote(rank), timeout=ANSWER_S)
            if broken := BROKEN_GPU.search(str(failure)):
                where = "".join(f" on {address}" for address in host.values())
                return WorkerLost(f"the GPU of worker {rank}{where} is broken ({broken[0]})", host)
            if _of_ray(failure):
                died |= host
    cause = _cause(list(failures.values()))
    if isinstance(cause, WorkerLost) and len(died) == 1:
        cause.died = died
    return cause


def _of_ray(failure: Exception) -> bool:
    """Returns whether Ray itself raised it: those are about processes and machines."""
    return type(failure).__module__.partition(".")[0] == "ray"


def _cause(failures: Sequence[Exception]) -> Exception:
    """Returns the error to raise where workers failed: an expected error, else a death, else the first of the rest."""
    for failure in failures:
        if isinstance(failure, Relayed):
            return failure.args[0]
    # What workers raise keeps its own type. The surviving workers may notice a death before Ray does, and then only
    # their failures are known.
    others = [failure for failure in failures if not _hung_up(failure)]
    if not others or any(map(_of_ray, failures)):
        reason = _last_words(failures)
        return WorkerLost("a worker died or could not start" + (f" ({reason})" if reason else ""))
    return others[0]


def gave_up(stage: str, e: Exception, lost: int) -> UserError:
    """Returns the error for ``lost`` failed starts without a new checkpoint."""
    what = f"{stage}: {e} {lost} times without a new checkpoint"
    if isinstance(e, UserError):
        return UserError(what)
    return UserError(
        f"{what}; look for the cause in {ray_logs()} (often too little memory: set micro_batch), then run again"
    )


def _last_words(failures: Sequence[Exception]) -> str:
    """Returns the first error of NCCL or gloo that lost workers have raised or logged, on one line; "" without one.

    NCCL ends a process that it finds an error in, so that only the log of the worker has it.
    """
    found = [match for failure in failures for match in DIED.finditer(str(failure))]
    dead = dict.fromkeys((int(m["pid"] or m["node_pid"]), m["ip"] or m["node_ip"]) for m in found)
    for pid, address in list(dead)[:LOGS]:
        if said := _logged(pid, address):
            return said[0][:LONGEST_REASON]
    raised = [" ".join(str(failure).split()) for failure in failures if _hung_up(failure)]
    # That the other side has gone is what follows from the first error, on another worker.
    raised.sort(key=lambda text: "remote process" in text or "by peer" in text)
    return raised[0][:LONGEST_REASON] if raised else ""


def _logged(pid: int, address: str) -> list[str]:
    """Returns the lines by which NCCL and torch's process groups tell of errors in a worker's log."""
    import ray
    from ray.util.state import get_log

    found = []
    for suffix in ("out", "err"):
        with suppress(Exception):  # of many kinds: a machine that is lost has no log, nor has a log that cannot be read
            here = local_logs() if address == ray.util.get_node_ip_address() else []
            if here:  # the Ray of one machine has no Jobs server to ask
                files = [file for folder in here for file in folder.glob(f"worker-*-{pid}.{suffix}")]
                text = "\n".join(file.read_text(errors="replace") for file in files)
            else:
                text = "".join(get_log(node_ip=address, pid=pid, suffix=suffix, tail=LOG_LINES, timeout=LOG_S))
            found += [" ".join(line.split()) for line in text.splitlines() if NCCL_ERROR.search(line)]
    return found


def _hung_up(failure: Exception) -> bool:
    """Returns whether a worker only lost the connection to another."""
    return isinstance(failure, DistError) or (isinstance(failure, RuntimeError) and "gloo/transport" in str(failure))


class Watcher:
    """Reports a worker's progress to Ray Train, and asks it whether a machine is to be taken away (``leaving``).

    All workers must do so equally often, so the clock of rank 0 decides when. Where steps are slow, the next report is
    due after fewer of them (``steps``).
    """

    def __init__(self, size: int, device: Any):
        self.size, self.device = size, device
        self.reported = self.listened = self.called = time.monotonic()
        self.leaving, self.steps = False, CHECK_EVERY

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Reports and asks where it is time to; all workers call it after the same steps."""
        import ray.train

        now = time.monotonic()
        took, self.called = now - self.called, now
        steps = self.steps
        if took > LISTEN_EVERY_S:
            steps = max(1, steps // 2)
        elif took < LISTEN_EVERY_S / 4:
            steps = min(CHECK_EVERY, 2 * steps)
        overdue = [now - self.reported > REPORT_EVERY_S, now - self.listened > LISTEN_EVERY_S, steps]
        due = torch.tensor(overdue, dtype=torch.uint8, device=self.device)
        if self.size > 1:
            torch.distributed.broadcast(due, src=0)
        report, listen, self.steps = due.tolist()
        if report:
            self.reported = now
            ray.train.report(dict(metrics))
        if listen:
            self.listened = now
            self.leaving = self.leaving or ray.train.get_preemption_info() is not None
