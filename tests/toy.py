"""A stage that a stranger might add: the lengths of the captions of every kept row."""

import json
from dataclasses import dataclass

from pipeline.graph.artifacts import Artifact, read_shards, read_table
from pipeline.graph.shards import map_shards
from pipeline.graph.stages import Context, Stage, shard_key
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.settings import ShardSettings
from pipeline.store import Store


@dataclass(frozen=True)
class ToyRecipe:
    """``longest`` cuts every length."""

    longest: int = 100


@dataclass(frozen=True)
class Count:
    """Writes the lengths of one shard."""

    store: Store
    longest: int

    def __call__(self, task: ShardTask) -> ShardOutput:
        table = read_table(self.store, task.inputs["captions"].blobs["captions"])
        lengths = [min(self.longest, len(captions[0])) for captions in table["captions"].to_pylist() if captions]
        return ShardOutput(Ledger(len(lengths)), {"lengths": json.dumps(lengths).encode()}, {})


@dataclass(frozen=True)
class MakeCount:
    """Makes the worker, in whatever process it works in."""

    store: Store
    longest: int

    def __call__(self) -> Count:
        return Count(self.store, self.longest)


def run_toy(ctx: Context) -> Artifact:
    """Counts, shard by shard."""
    shards = read_shards(ctx.store, ctx.inputs["captions"])
    tasks = [ShardTask(s.number, shard_key(ctx, {"captions": s.key}), {"captions": s}) for s in shards]
    return map_shards(ctx, tasks, MakeCount(ctx.store, ctx.recipe.longest))


TOY = Stage("toy", 1, ToyRecipe(), ("captions",), run_toy, settings=ShardSettings(workers=0))
