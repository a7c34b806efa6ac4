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

from pipeline.errors import CorruptObject, UserError
from pipeline.settings import RaySettings, TrainingSettings
from pipeline.training.checkpoints import Superseded
from pipeline.training.loop import NonFinite, OutOfMemory
from pipeline.training.world import World, choose_device

Work = Callable[[World], None]
REPORT_EVERY_S = 30.0  # a report waits for the controller's next poll, up to two seconds
RELAYED = {kind.__name__: kind for kind in (UserError, NonFinite, Superseded, CorruptObject, OutOfMemory)}


class WorkerLost(Exception):
    """A worker or its machine died. The training can go on from its newest checkpoint."""


class Relayed(Exception):
    """An expected error on its way to the driver: the name of its type, then its arguments."""


def launch(work: Work, name: str, settings: TrainingSettings, ray_settings: RaySettings) -> None:
    """Call ``work`` in ``settings.workers`` Ray workers, or for 0 in this process, and wait for all of them.

    ``name`` must be new for every call: Ray Train would resume an old one. Raises what a worker raised of UserError,
    CorruptObject, Superseded and OutOfMemory as that type, and WorkerLost when one died.
    """
    if settings.workers == 0:
        use_threads(settings.threads or cores())
        work(World(device=choose_device(settings.device)))
        return
    from pipeline.launch import start_ray

    ray = start_ray(ray_settings)
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
    from ray.train.torch import TorchTrainer

    total = ray.cluster_resources()
    if "RAY_ADDRESS" not in os.environ and total.get("CPU", 0) < settings.workers:
        raise UserError(
            f"run.ray.cpus: {total.get('CPU', 0):.0f} are too few for {settings.workers} workers of one core each; "
            "raise it or lower workers"
        )
    gpus = settings.device != "cpu" and total.get("GPU", 0) >= settings.workers
    if settings.device.startswith("cuda") and not gpus:
        raise UserError(f"{name}: {settings.workers} workers on {settings.device}, but Ray has not as many GPUs")
    with tempfile.TemporaryDirectory(prefix="unclip-train-") as scratch:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"work": work, "threads": settings.threads},
            scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=gpus),
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
    use_threads(config["threads"] or max(1, cores() // context.get_local_world_size()))
    size = context.get_world_size()
    device = ray.train.torch.get_device()
    try:
        config["work"](World(context.get_world_rank(), size, device, Reporter(size, device)))
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
    # What Ray itself raises is about processes and machines; what workers raise keeps its own type.
    if any(type(failure).__module__.partition(".")[0] == "ray" for failure in failures):
        return WorkerLost("a worker died or could not start")
    return failures[0]


class Reporter:
    """Reports to Ray Train now and then. All workers must report equally often, so the clock of the first one rules."""

    def __init__(self, size: int, device: Any):
        self.size, self.device = size, device
        self.last = time.monotonic()

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        import ray.train
        import torch

        due = torch.tensor([time.monotonic() - self.last > REPORT_EVERY_S], dtype=torch.uint8, device=self.device)
        if self.size > 1:
            torch.distributed.broadcast(due, src=0)
        if due.item():
            self.last = time.monotonic()
            ray.train.report(dict(metrics))
