"""Workers of a training as plain processes, joined by gloo: what Ray Train makes, without a Ray."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from pipeline.graph.stages import Context
from pipeline.training.checkpoints import Course, course
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.worker import Training


def _work(rank: int, ctx: Context, own: Course, meeting: Path) -> None:
    torch.set_num_threads(1)
    settings = ctx.settings
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=settings.workers)
    Training(ctx, own)(ProcessGroup(rank, settings.workers, sharded=settings.sharded, offload=settings.offload))
    dist.destroy_process_group()


def train_together(ctx: Context, folder: Path) -> None:
    """Train as many workers as the settings say, from the newest checkpoint to the recipe's stop."""
    own = course(ctx, begin=True)
    meeting = folder / f"meeting-{own.branch.attempt}"
    multiprocessing.spawn(_work, (ctx, own, meeting), nprocs=ctx.settings.workers)
