"""``unclip generate PROMPTS``: pictures of many prompts with a finished bundle, on many workers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jobs.sample import bundle_artifact, newest_output, sampling_option
from pipeline.errors import CorruptObject, UserError
from pipeline.progress import counted, duration
from pipeline.prompts import read_prompts

HEALINGS = 3  # damaged objects, until somebody has to look


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="unclip generate", description=__doc__)
    parser.add_argument("prompts", type=Path, help="a text file, one prompt a line, or a .parquet with a column prompt")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FOLDER", help="a run's output folder, such as out/emoji"
    )
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="where tars and tables are written (FOLDER/generated)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next have the next (default 0)")
    parser.add_argument("--batch", type=int, default=8, help="pictures that a worker samples at once (8)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one core each; 0 works in this one (2)")
    parser.add_argument("--gpus", type=float, default=0.0, help="of each worker, in place of its core (0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a sampling option, such as prior=ar"
    )
    arguments = parser.parse_args(argv)
    output = arguments.source or newest_output()
    to = arguments.to or output / "generated"
    store, bundle = bundle_artifact(output)

    from pipeline.execute import heal
    from pipeline.generation import ROWS, STAGE, GenerationRecipe, export, generate
    from pipeline.settings import GenerationSettings, RaySettings

    try:
        recipe = GenerationRecipe(dict(sampling_option(text) for text in arguments.set), arguments.batch)
        settings = GenerationSettings(workers=arguments.workers, gpus=arguments.gpus)
    except ValueError as e:
        raise UserError(f"--{e}") from e
    ray = RaySettings(cpus=max(1, arguments.workers))
    for _ in range(HEALINGS):
        made = None
        try:
            parts = read_prompts(arguments.prompts, arguments.seed, ROWS)
            made = generate(store, bundle, parts, recipe, settings, ray)
            tars = list(export(store, made, to))
            break
        except CorruptObject as e:
            damage = e
            heal(store, e, {"bundle": bundle} | ({} if made is None else {STAGE: made}))
    else:
        raise UserError(f"{damage}; if it belongs to the bundle, run its configuration again, and then this")
    lost = "".join(f", {counted(n, 'prompt')} {reason}" for reason, n in made.ledger.rejected.items())
    print(f"{counted(made.ledger.kept, 'picture')}{lost}, {duration(made.times['seconds'])}")
    print(f"{counted(len(tars), 'tar')}, each with a table of seeds and scores: {to}")
    return 0


if __name__ == "__main__":
    import sys

    from jobs.cli import guard

    sys.exit(guard(main, sys.argv[1:]))
