"""Compares four trainings at once with the same four one after another, on a local cluster of four nodes of one core.

Each trains a small diffusion prior, and waits besides for as long as --seconds says, since this machine may have fewer
cores than the cluster claims. The artefacts of both ways must be equal to the bit.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.images import publish
from benchmarks.timing import begin, finish, interleave, parser, ratio, show
from pipeline.config import Run, preset_config
from pipeline.graph import execute as execution
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.execute import execute
from pipeline.graph.plan import Verdict
from pipeline.graph.stages import Stage, stage_key
from pipeline.settings import TrainingSettings
from pipeline.store import open_store
from pipeline.training import stage
from pipeline.training import train as training
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.recipes import DiffusionPriorRecipe
from pipeline.training.train import Worker

DATA = ("pairs", "captions", "embeddings", "curation")
TRAININGS = tuple(f"prior_{i}" for i in range(4))
MEMORY = 100 << 20


@dataclass(frozen=True)
class Waiting(Worker):
    """A training that begins with a wait of some seconds."""

    seconds: float = 0.0

    def __call__(self, group: ProcessGroup) -> None:
        time.sleep(self.seconds)
        super().__call__(group)


@contextmanager
def four_nodes() -> Any:
    """Has RAY_ADDRESS name a cluster for as long as the block lasts."""
    import ray
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(3):
            cluster.add_node(**node)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def train(folder: Path, model: Any) -> dict[str, Artifact]:
    """Returns the artefacts of the trainings, made from the data in the store of a folder."""
    recipes = {name: _recipe(seed, model) for seed, name in enumerate(TRAININGS)}
    graph = {name: Stage(name, 1, None, (), lambda _: None) for name in DATA}  # type: ignore[arg-type,return-value]
    settings = TrainingSettings(workers=1, threads=1, device="cpu")
    graph |= {
        n: replace(stage.DIFFUSION_PRIOR, name=n, recipe=recipe, inputs=DATA, settings=settings)
        for n, recipe in recipes.items()
    }
    keys = {name: name for name in DATA}
    keys |= {name: stage_key(graph[name], keys) for name in TRAININGS}
    verdicts = [Verdict(name, key, "stale") for name, key in keys.items()]
    config = SimpleNamespace(run=Run(output=str(folder)), project="side-by-side")
    return execute(graph, verdicts, set(graph), open_store(str(folder)), config, {}, lambda *_: None, lambda *_: None)


def _recipe(seed: int, model: Any) -> DiffusionPriorRecipe:
    return DiffusionPriorRecipe(
        samples=128, batch=16, lanes=8, seed=seed, learning_rate=1e-4, ema_half_life=10_000, model=model
    )


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=60.0, help="that each training waits (60)")
    chosen = options.parse_args()
    begin(__doc__, chosen)
    seconds = 1.0 if chosen.quick else chosen.seconds
    training.Worker = partial(Waiting, seconds=seconds)  # type: ignore[misc,assignment]
    model = preset_config("nano").diffusion_prior.model
    model = replace(model, text_encoder=type(model)().text_encoder)
    made: dict[str, dict[str, Any]] = {}
    beside = execution.room_beside
    with tempfile.TemporaryDirectory() as scratch, four_nodes():
        data = Path(scratch, "data")
        store = open_store(str(data))
        for artifact in publish(store, 2, 32).values():
            publish_artifact(store, artifact, 0.0)

        def case(name: str, room: Callable[..., list[str]]) -> Callable[[], None]:
            def run() -> None:
                execution.room_beside = room
                shutil.rmtree(Path(scratch, name), ignore_errors=True)
                shutil.copytree(data, Path(scratch, name))
                found = train(Path(scratch, name), model)
                made[name] = {stage: found[stage].blobs for stage in TRAININGS}

            return run

        cases = {"together": case("together", beside), "in turn": case("in turn", lambda *_: [])}
        took = interleave(cases, chosen.rounds, warmup=0)
    weights = [{stage: blobs["model.safetensors"] for stage, blobs in each.items()} for each in made.values()]
    if weights[0] != weights[1] or len(set(weights[0].values())) < len(TRAININGS):
        raise ValueError(f"trainings at once made other models than one after another: {weights}")
    show(took, 1, "s")
    finish({"together_over_in_turn": ratio(took, "together", "in turn")})


if __name__ == "__main__":
    main()
