"""Adds a stage to a project: how bright is every image?

    python examples/add_stage.py [CONFIG]

It is planned, resumed, kept and shown as the stages of the pipeline are. docs/extend.md explains each part.
"""

import sys
from dataclasses import dataclass
from functools import partial

import unclip
from unclip.stages import (
    Artifact,
    Context,
    Ledger,
    Place,
    ShardOutput,
    ShardSettings,
    ShardTask,
    Stage,
    Store,
    map_shards,
    read_images,
    read_pair_pixels,
    read_shards,
    read_table,
    shard_key,
    write_table,
)


@dataclass(frozen=True)
class BrightnessRecipe:
    """All that may change the result: it is a part of the key."""

    side: int = 64


@dataclass(frozen=True)
class Measure:
    """Measures one shard; a worker of Ray, or this process where the settings say ``workers=0``."""

    store: Store
    recipe: BrightnessRecipe

    def __call__(self, task: ShardTask) -> ShardOutput:
        pairs = task.inputs["pairs"]
        rows = [row for row in read_table(self.store, pairs.blobs["index"]).to_pylist() if row["status"] == "kept"]
        places = [Place.of(row, pairs.blobs.get("images")) for row in rows]
        values = []
        for place, file in zip(places, read_images(self.store, places), strict=True):
            view = read_pair_pixels(place.key, file, self.recipe.side, in_place=place.in_place)
            values.append(float(view.mean()) / 255)
        table = write_table({"key": [row["key"] for row in rows], "brightness": values})
        return ShardOutput(Ledger(kept=len(rows)), {"brightness": table})


def run(ctx: Context) -> Artifact:
    """Makes a task for each shard of pairs; a shard that is made already is not made again."""
    shards = read_shards(ctx.store, ctx.inputs["pairs"])
    tasks = [ShardTask(shard.number, shard_key(ctx, {"pairs": shard.key}), {"pairs": shard}) for shard in shards]
    return map_shards(ctx, tasks, partial(Measure, ctx.store, ctx.recipe), rows=sum(shard.kept for shard in shards))


def show(store: Store, made: Artifact) -> dict[str, float]:
    """Returns what the report says: numbers or text by name, and images as the bytes of a file."""
    tables = [read_table(store, shard.blobs["brightness"]) for shard in read_shards(store, made)]
    values = [value for table in tables for value in table["brightness"].to_pylist()]
    return {"darkest": min(values), "mean": sum(values) / len(values), "brightest": max(values)}


BRIGHTNESS = Stage("brightness", 1, BrightnessRecipe, ("pairs",), run, settings=ShardSettings, show=show)

if __name__ == "__main__":
    project = unclip.open(*(sys.argv[1:2] or ["configs/nano.yaml"]), "run.brightness.workers=0", stages=[BRIGHTNESS])
    project.run(until="captions")
    project.run(until="brightness")
    table = project.artifact("brightness").table().sort_by("brightness")
    captions = {pair.key: pair.caption for pair in project.pairs(curated=False)}
    for row in table.slice(0, 5).to_pylist():
        print(f"{row['brightness']:.2f}  {captions[row['key']]}")
