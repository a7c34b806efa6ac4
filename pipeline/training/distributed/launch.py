"""Workers of a training: in this process, or as Ray workers by Ray Train. The only file of a training that knows Ray.

Ray Train starts the workers, joins them in a process group and watches them. Checkpoints and resuming are not its
business: a worker that starts reads the newest checkpoint from the store.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.errors import CorruptObject, Superseded, Unreachable, UserError
from pipeline.settings import RaySettings, TrainingSettings
from pipeline.training.distributed.world import World, choose_device
from pipeline.training.loop import NonFinite, OutOfMemory

Work = Callable[[World], None]
REPORT_EVERY_S = 30.0  # a report waits for the controller's next poll, up to two seconds
LISTEN_EVERY_S = 5.0  # all workers wait for each other to hear that a machine is to be taken away
EXPECTED = (UserError, Unreachable, NonFinite, Superseded, CorruptObject, OutOfMemory)
RELAYED = {kind.__name__: kind for kind in EXPECTED}


class WorkerLost(Exception):
    """A worker or its machine died. The training can go on from its newest checkpoint."""


class Relayed(Exception):
    """An expected error on its way to the driver: the name of its type, then its arguments."""


def launch(work: Work, stage: str, name: str, settings: TrainingSettings, ray_settings: RaySettings) -> None:
    """Call ``work`` in ``settings.workers`` Ray workers, or for 0 in this process, and wait for all of them. On the Ray
    of this machine there are no more than it has room for.

    With ``settings.min_workers`` it begins with as many as there are cores or GPUs for, and Ray Train starts ``work``
    anew with more when more come. So it does after a machine was taken away that it had been told of.

    ``name`` must be new for every call: Ray Train would resume an old one. Raises what a worker raised of EXPECTED as
    that type, WorkerLost when one died, and UserError where there is no room.
    """
    if settings.workers == 0:
        use_threads(settings.threads or cores())
        work(World(device=choose_device(settings.device)))
        return
    from pipeline.graph.ray import find_room, start_ray

    ray = start_ray(ray_settings)
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    team = find_room(ray, {stage: settings})[stage]
    share, gpus = team.worker, team.worker.gpus > 0
    taken = {"CPU": share.cpus, "GPU": share.gpus, "memory": share.memory}
    asked: dict[str, Any] = {
        "num_workers": (settings.min_workers, team.count) if settings.min_workers else team.count,
        "use_gpu": gpus,
        "resources_per_worker": {name: amount for name, amount in taken.items() if amount},
        "label_selector": dict(share.labels) or None,
    }
    with tempfile.TemporaryDirectory(prefix="unclip-train-") as scratch:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"work": work, "settings": settings},
            # Weights on the CPU are added up there.
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus and settings.offload else None),
            scaling_config=ScalingConfig(**asked),
            run_config=RunConfig(name=name, storage_path=scratch, failure_config=FailureConfig(max_failures=0)),
        )
        try:
            trainer.fit()
        except WorkerGroupError as e:
            raise _cause(list(e.worker_failures.values())) from e
        except TrainingFailedError as e:  # of starting the workers, or of watching them
            raise _cause([e]) from e


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(count: int) -> None:
    """Compute on ``count`` threads. Said aloud, because Ray lowers OMP_NUM_THREADS in its workers."""
    import torch

    torch.set_num_threads(count)


def _worker(config: Mapping[str, Any]) -> None:
    """One Ray worker. Errors that the driver understands travel in a form that survives the journey."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    settings: TrainingSettings = config["settings"]
    use_threads(settings.threads or max(1, cores() // context.get_local_world_size()))
    size = context.get_world_size()
    device = ray.train.torch.get_device()
    try:
        watcher = Watcher(size, device)
        sharing = {"sharded": settings.sharded, "offload": settings.offload}
        rank = context.get_world_rank()
        config["work"](World(rank, size, device, watcher.report, lambda: watcher.leaving, **sharing))
    except CorruptObject as e:
        raise Relayed("CorruptObject", e.path, e.why) from None
    except OutOfMemory as e:
        raise Relayed("OutOfMemory", *e.args) from None
    except (UserError, Superseded) as e:
        raise Relayed(type(e).__name__, str(e)) from None


def _cause(failures: Sequence[Exception]) -> Exception:
    """What to tell of the ways in which workers failed: an expected error, else a death, else the first of the rest."""
    for failure in failures:
        if isinstance(failure, Relayed):
            name, *arguments = failure.args
            return RELAYED[name](*arguments)
    # What Ray itself raises is about processes and machines; what workers raise keeps its own type. Those that are left
    # may notice a death before Ray does, and then theirs are the only failures.
    others = [failure for failure in failures if not _hung_up(failure)]
    if not others or any(type(failure).__module__.partition(".")[0] == "ray" for failure in failures):
        return WorkerLost("a worker died or could not start")
    return others[0]


def _hung_up(failure: Exception) -> bool:
    """Whether a worker says no more than that it lost the connection to another."""
    from torch.distributed import DistError

    return isinstance(failure, DistError) or (isinstance(failure, RuntimeError) and "gloo/transport" in str(failure))


class Watcher:
    """Tells Ray Train how far a worker is, and hears from it, now and then. All workers must do so equally often, so
    the clock of the first one rules. ``leaving``: whether a machine of this training is to be taken away."""

    def __init__(self, size: int, device: Any):
        self.size, self.device = size, device
        self.reported = self.listened = time.monotonic()
        self.leaving = False

    def report(self, metrics: Mapping[str, Any]) -> None:
        """To be called by all workers after the same steps."""
        import ray.train
        import torch

        now = time.monotonic()
        wishes = [now - self.reported > REPORT_EVERY_S, now - self.listened > LISTEN_EVERY_S]
        due = torch.tensor(wishes, dtype=torch.uint8, device=self.device)
        if self.size > 1:
            torch.distributed.broadcast(due, src=0)
        report, listen = due.tolist()
        if report:
            self.reported = now
            ray.train.report(dict(metrics))
        if listen:
            self.listened = now
            self.leaving = self.leaving or ray.train.get_preemption_info() is not None
