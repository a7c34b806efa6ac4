"""``unclip generate PROMPTS``: images of many prompts with a finished bundle, on many workers."""

from __future__ import annotations

import argparse
import json
import logging
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jobs.bundles import find_bundle
from jobs.drawing import plain_errors, read_options, slug, writable
from jobs.output import say
from pipeline.errors import UserError
from pipeline.graph.ray import find_machine, this_machine
from pipeline.graph.resources import team_of
from pipeline.parse import parse
from pipeline.progress import counted, duration
from pipeline.sampling.prompts import find_column, read_prompts
from pipeline.sampling.recipe import ImageRecipe, add_chunks, describe, own_version
from pipeline.settings import GenerationSettings, RaySettings

log = logging.getLogger("unclip")


def main(arguments: argparse.Namespace) -> int:
    """Runs ``unclip generate``."""
    with plain_errors():
        asked = describe("draw", read_options(arguments.overrides), seed=arguments.seed)
    if asked.n > 1 or asked.side:
        raise UserError("generate draws one image of each prompt, of 64, 256 or 1024 px; leave n and other sizes out")
    column = find_column(arguments.prompts, arguments.column)
    found = find_bundle(arguments.source)
    to = writable(arguments.to or found.output / "generated", single=False)
    if column:
        say(f"prompts: column {column} of {arguments.prompts}")
    store, bundle = found.stored()

    from pipeline.sampling.generation import ROWS, GenerationRecipe, export, generate

    recipe = parse(GenerationRecipe, {"options": asked.options, "batch": arguments.batch}, "--")
    settings, ray = _workers(arguments)
    parts = read_prompts(arguments.prompts, asked.seed, ROWS, column)
    made = generate(store, bundle, parts, recipe, settings, ray, to)
    tars = list(export(store, made, to))
    lost = "".join(f", {counted(n, 'prompt')} {reason}" for reason, n in made.ledger.rejected.items())
    say(f"{counted(made.ledger.kept, 'image')}{lost}, {duration(made.times['seconds'])}")
    say(f"{counted(len(tars), 'tar')}, each with a table of seeds and scores: {to}")
    if arguments.png:
        recipe = replace(asked, caption="", bundle=bundle.key, version=own_version())
        say(f"{counted(_write_images(tars, to / 'png', recipe), 'PNG')}, each with its recipe: {to / 'png'}")
    return 0


def _write_images(tars: Sequence[Path], folder: Path, recipe: ImageRecipe) -> int:
    """Writes the images of tars as PNG files, named by their keys and prompts, and returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for tar in tars:
        with tarfile.open(tar) as members:
            files = {member.name: members.extractfile(member) for member in members}
            for name in sorted(name for name in files if name.endswith(".json")):
                about, image = (files[name.removesuffix("json") + kind] for kind in ("json", "png"))
                assert about
                assert image
                row = json.loads(about.read())
                own = replace(recipe, caption=row["prompt"], seed=row["seed"])
                path = folder / f"{row['key']}-{slug(row['prompt'])}.png"
                path.write_bytes(add_chunks(image.read(), own.chunks()))
                written += 1
    return written


def _workers(arguments: argparse.Namespace) -> tuple[GenerationSettings, RaySettings]:
    """Returns the workers, each with a GPU if there are GPUs and nothing else is asked for, and says what they draw on.

    Raises UserError for GPUs that are not there and for numbers that cannot be.
    """
    gpus, asked, ray = arguments.gpus, arguments.device, RaySettings()
    if asked == "cpu" and gpus:
        raise UserError(f"--gpus {gpus:g} and --device cpu exclude each other; leave one of them out")
    if asked == "cuda" and gpus == 0:
        raise UserError("--gpus 0 and --device cuda exclude each other; leave one of them out")
    given = {"workers": arguments.workers, "gpus": 0 if asked == "cpu" else gpus}
    settings = parse(GenerationSettings, {name: value for name, value in given.items() if value is not None}, "--")
    machine = this_machine(ray) if settings.workers == 0 else find_machine(ray)
    if asked == "cuda" and not gpus and not machine.gpus:
        raise UserError("--device cuda: no GPU was found; use --device cpu, or --gpus on a cluster with an autoscaler")
    team = team_of(settings, machine)
    gpus = team.worker.gpus
    settings = replace(settings, workers=team.count, gpus=gpus)
    where = f"{gpus:g} GPU" if gpus else "one core of the CPU"
    log.info("drawing on %s%s", where, f" in each of {counted(team.count, 'worker')}" if team.count else "")
    return settings, ray
