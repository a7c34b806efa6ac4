"""``unclip sample "CAPTION"``: turn captions into images with a finished bundle."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jobs.bundles import find_bundle
from jobs.drawing import file_name, one_file, plain_errors, read_options, writable, write_png
from jobs.output import say
from pipeline.data.source.columns import IMAGES
from pipeline.errors import UserError
from pipeline.sampling.recipe import describe


def main(arguments: argparse.Namespace) -> int:
    """Runs ``unclip sample``."""
    options = read_options(arguments.overrides)
    asked = arguments.captions, options, arguments.seed, arguments.n, arguments.source, arguments.to, arguments.device
    for path in sample(*asked):
        say(path)
    return 0


def sample(
    captions: Sequence[str],
    options: Mapping[str, Any],
    seed: int | None,
    n: int | None,
    source: str | None,
    to: Path | None,
    device: str,
) -> Iterator[Path]:
    """Draws captions with the bundle at ``source`` and yields each file as soon as it is written.

    In a program this is ``unclip.Model.generate``. Raises UserError for what cannot be drawn or written.
    """
    for text in captions:
        kind = os.path.splitext(text)[1].lower()
        if kind in IMAGES and not os.path.exists(text):
            raise UserError(f"{text}: no such file, and sample takes captions; end a caption with a full stop")
        if kind and os.path.isfile(text):
            command = f"unclip {'redraw' if kind == '.png' else 'generate'} {shlex.quote(text)}"
            raise UserError(f"{text}: is a file, and sample takes captions; draw what it holds with {command}")
    with plain_errors():
        asked = describe("draw", options, caption=captions[0], seed=seed, n=n)
        each = [replace(asked, caption=text, seed=asked.seed + i * asked.n) for i, text in enumerate(captions)]
    recipes = [one.of(row) for one in each for row in one.rows]
    single = one_file(to, len(recipes))
    bundle = find_bundle(source)
    where = writable(to or bundle.output / "samples", single)
    folder = bundle.folder

    from models.tokens import check_captions
    from pipeline.sampling.drawing import open_bundle, refusals
    from pipeline.sampling.operations import draw_recipe, resolve_sampling

    with refusals():
        check_captions(captions)
        unclip = open_bundle(folder, device)
        settings = asdict(resolve_sampling(unclip, asked))
        for recipe in recipes:
            # One at a time: then the same recipe has the same pixels, whatever is drawn beside it.
            [pixels] = draw_recipe(unclip, recipe)
            done = recipe.drawn(settings, bundle.key)
            request: dict[str, Any] = {"caption": recipe.caption, "settings": settings, "bundle": bundle.name}
            request |= {"side": done.side} if done.side else {}
            name = f"{file_name(recipe.caption or '', request, recipe.seed)}.png"
            yield write_png(where if single else where / name, pixels, done)
