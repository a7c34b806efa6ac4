"""Compares the training loop with a bare one: forward, backward, clip and optimiser on batches that are in memory.

The prior and the decoder of the preset small, in batches of 16, from shards in a folder: ours reads, decodes, draws,
averages weights, keeps the journal and checks that losses are finite; then once more, and a checkpoint is written
meanwhile. From that comes the time with one a minute, over that without. All train one model with one fused AdamW.
A round is at least --seconds of steps after one that does not count.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from benchmarks.images import publish
from benchmarks.timing import Seconds, begin, finish, parser, show
from models.clip import Clip
from models.precision import autocast
from models.prior_configs import ClipConfig
from models.random_streams import RandomStreams
from pipeline.config import preset_config
from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.settings import TrainingSettings
from pipeline.store import Store, open_store
from pipeline.store.records import put_blob
from pipeline.training.checkpoints import open_checkpoints
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.feed.feed import Feed
from pipeline.training.recipes import DecoderRecipe, DiffusionPriorRecipe, TrainingRecipe
from pipeline.training.saver import Saver
from pipeline.training.state import TrainState
from pipeline.training.state import begin as begin_training
from pipeline.training.task import Task, task_of
from pipeline.training.timing import shares_of
from pipeline.training.train import fit

BATCH, SHARDS = 16, 2
STAGES = ("diffusion_prior", "decoder")


@dataclass
class Ours:
    """The loop as a training runs it, but without validation.

    ``seconds`` holds the times of steps without a checkpoint. ``saved``: whether the last checkpoint was written
    before the steps beside it ended.
    """

    ctx: Context
    task: Task
    feed: Feed
    state: TrainState
    saver: Saver
    seconds: Counter[str] = field(default_factory=Counter)
    saved: bool = False

    def run(self, steps: int) -> float:
        """Returns the seconds of some steps after one that does not count."""
        seconds = self._fit(steps, saving=False)
        self.seconds.update(self.state.phase_seconds)
        return seconds

    def run_saving(self, steps: int) -> float:
        """Returns the same, with a checkpoint from the start of what counts."""
        seconds = self._fit(steps, saving=True)
        self.saved = self.saver._last is not None and self.saver._last.done()
        self.saver.wait()
        return seconds

    def _fit(self, steps: int, saving: bool) -> float:
        self.state.phase_seconds.clear()
        recipe = replace(self.ctx.recipe, samples=self.state.samples + (steps + 1) * BATCH)
        times: list[float] = []

        def pause(state: TrainState) -> None:
            times.append(perf_counter())
            if saving and len(times) == 2:
                self.saver.save(state)

        fit(self.ctx.stage, self.feed, recipe, TrainingSettings(), ProcessGroup(), self.state, pause)
        return times[-1] - times[1]


class Bare:
    """The least that a training has to do.

    It goes on with our model: two models at different places in memory can differ by more than what is measured.
    """

    def __init__(self, recipe: TrainingRecipe, task: Task, feed: Feed, state: TrainState):
        self.recipe, self.task = recipe, task
        self.model, self.optimizer = state.model.train(), state.optimizer
        with closing(feed.batches(0)) as shares:
            self.shares = list(islice(shares, 8))

    def run(self, steps: int) -> float:
        """Returns the seconds of some steps after one that does not count."""
        for number in range(steps + 1):
            if number == 1:
                start = perf_counter()
            share = self.shares[number % len(self.shares)]
            with autocast(torch.device("cpu"), self.recipe.precision):
                loss = self.task.loss(self.model, share.batch, RandomStreams(share.streams)).total.mean()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm or float("inf"))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return perf_counter() - start


def measure(ctx: Context, rounds: int, seconds: float) -> dict[str, float]:
    """Returns the ratios of one model."""
    task, recipe = task_of(ctx), ctx.recipe
    feed = Feed(ctx.store, ctx.inputs, task, recipe)
    ours = Ours(
        ctx,
        task,
        feed,
        begin_training(task, recipe, ProcessGroup()),
        Saver(open_checkpoints(ctx, begin=True), ProcessGroup()),
    )
    cases: dict[str, Callable[[int], float]] = {
        "bare": Bare(recipe, task, feed, ours.state).run,
        "ours": ours.run,
        "ours, saving": ours.run_saving,
    }
    steps = max(1, ceil(seconds / min(run(1) for run in cases.values())))
    ours.seconds.clear()
    took: Seconds = {name: [] for name in cases}
    for number in range(rounds):
        first = number % len(cases)
        for name in [*cases][first:] + [*cases][:first]:
            took[name].append(cases[name](steps))
        if seconds and not ours.saved:
            raise ValueError(f"a checkpoint takes longer than a round of {steps} steps: give more --seconds")
    print(f"  {ctx.stage}: {sum(p.numel() for p in ours.state.model.parameters()) / 1e6:.0f}M weights, {steps} steps")
    show(took, 1, "s")
    shares = shares_of(ours.seconds, sum(took["ours"]))
    print("  where ours goes: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    ratios = [a / b for a, b in zip(took["bare"], took["ours"], strict=True)]
    print(f"  bare over ours: {min(ratios):.3f} to {max(ratios):.3f}")
    name = ctx.stage
    costs = [b - a for a, b in zip(took["ours"], took["ours, saving"], strict=True)]
    print(f"  a checkpoint costs {min(costs):.1f} to {max(costs):.1f} s")
    return {
        f"{name}_bare_over_ours": median(ratios),
        f"{name}_with_a_checkpoint_a_minute": 1 + median(costs) / 60,
        f"{name}_wait_share": shares["wait"],
        f"{name}_ema_share": shares["ema"],
    }


def publish_clip(store: Store, model: ClipConfig, folder: Path) -> Artifact:
    """Publishes a CLIP of random weights, whose text tower the models read. ``folder`` holds its files."""
    Clip.build(model, seed=0).save(folder)
    return Artifact("clip", "clip", {}, {}, Ledger(), {file.name: put_blob(store, file) for file in folder.iterdir()})


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=20.0, help="of a round, at least (20)")
    options.add_argument("--stage", choices=STAGES, action="append", help="of one model only; both by default")
    chosen = options.parse_args()
    begin(__doc__, chosen)
    preset = preset_config("nano" if chosen.quick else "small")
    recipes: dict[str, Any] = {"diffusion_prior": DiffusionPriorRecipe, "decoder": DecoderRecipe}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(str(Path(folder)))
        clip = preset.clip.model
        inputs = publish(store, SHARDS, 32 if chosen.quick else 512, dim=clip.embed_dim)
        inputs["clip"] = publish_clip(store, clip, Path(folder) / "clip")
        for stage in chosen.stage or STAGES:
            recipe = recipes[stage](
                samples=BATCH,
                batch=BATCH,
                lanes=8,
                learning_rate=1e-4,
                ema_half_life=10_000,
                model=getattr(preset, stage).model,
            )
            ctx = Context(store, stage, 1, stage, recipe, TrainingSettings(device="cpu"), inputs)
            ratios |= measure(ctx, 1 if chosen.quick else chosen.rounds, 0.0 if chosen.quick else chosen.seconds)
    finish(ratios)


if __name__ == "__main__":
    main()
