"""How long a training stands still when a worker is killed: from kill -9 to the next step of the optimiser.

The nano diffusion prior on two workers of a local Ray, with a checkpoint after every step, so that the store shows it.
A round kills one worker.
"""

import os
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from benchmarks.pictures import publish
from benchmarks.timing import begin, finish, parser, show
from models.presets import PRESETS
from pipeline.graph.stages import Context, Stage, stage_key
from pipeline.settings import RaySettings, TrainingSettings
from pipeline.store import open_store
from pipeline.training.checkpoints import course
from pipeline.training.recipes import DiffusionPriorRecipe
from pipeline.training.stage import run_diffusion_prior

WANTED_S = 30.0
STAGE, BATCH, WORKERS = "diffusion_prior", 32, 2
INPUTS = ("pairs", "captions", "embeddings", "curation")


def make_context(folder: Path, steps: int) -> Context:
    store = open_store(str(folder))
    inputs = publish(store, 2, 64)
    recipe = DiffusionPriorRecipe(
        samples=steps * BATCH, batch=BATCH, lanes=8, learning_rate=1e-4, precision="fp32", model=PRESETS["nano"][STAGE]
    )
    stage = Stage(STAGE, 1, recipe, INPUTS, run_diffusion_prior)
    key = stage_key(stage, {name: inputs[name].key for name in INPUTS})
    settings = TrainingSettings(workers=WORKERS, threads=1, device="cpu", checkpoint_every_s=0.0)
    config: Any = SimpleNamespace(run=SimpleNamespace(ray=RaySettings(cpus=WORKERS)))
    return Context(store, STAGE, 1, key, recipe, settings, {name: inputs[name] for name in INPUTS}, config)


def measure(ctx: Context, rounds: int) -> list[float]:
    """Of each round the seconds from the kill until a step that had not been saved before it is."""
    from tests.chaos.strikes import kill_one, ours

    own, draw = course(ctx, begin=False), random.Random(0)
    newest = partial(own.newest, ctx.recipe.samples)
    seconds: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(run_diffusion_prior, ctx)

        def wait_for(samples: int) -> None:
            while newest() < samples:
                if training.done():
                    raise SystemExit(f"the training ended after {newest() // BATCH} steps, too early") from (
                        training.exception()
                    )
                time.sleep(0.02)

        for _ in range(rounds):
            wait_for(newest() + 20 * BATCH)
            began = time.monotonic()
            print(f"  {kill_one(ours('RayTrainWorker'), draw)} at step {newest() // BATCH}")
            time.sleep(0.5)  # what was on its way to the store arrives
            wait_for(newest() + BATCH)
            seconds.append(time.monotonic() - began)
        training.result()
    return seconds


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(rounds=3, threads=1)
    chosen = options.parse_args()
    begin(__doc__, chosen)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    rounds = 1 if chosen.quick else chosen.rounds
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(make_context(Path(folder), steps=200 * (rounds + 1)), rounds)
    show({"from the kill to the next step": seconds}, 1, "s")
    finish({"seconds_over_wanted": median(seconds) / WANTED_S})


if __name__ == "__main__":
    main()
