"""``unclip data look SOURCE ...``: one page about a list before anything is trained on it."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from jobs.init import READING, preview_named
from jobs.output import print_json, say, warn
from pipeline.config import load_config
from pipeline.data.pairs.preview import preview
from pipeline.data.source.journal import EMPTY, read_journal
from pipeline.data.source.lists import pinned
from pipeline.data.source.recipe import SourceRecipe
from pipeline.errors import UserError
from pipeline.graph.ray import this_machine
from pipeline.look.overview import Look, look_at
from pipeline.look.proposal import propose
from pipeline.settings import RaySettings
from pipeline.starter import CLIP_WEIGHTS
from pipeline.store import open_store

IMAGES, MOST_IMAGES = 100, 10_000  # of the sample: as many as one shard may hold
PAGE = "look.html"
CONFIGS = (".yaml", ".yml")


def main(arguments: argparse.Namespace) -> int:
    """Writes the page, and prints what it says in short."""
    reading = {name: value for name in READING if (value := getattr(arguments, name)) != getattr(SourceRecipe, name)}
    page = arguments.output or _beside(arguments.sources, arguments.overrides)
    tell = warn if arguments.json else say
    replaced = " (in place of an earlier one)" if os.path.exists(page) else ""
    found = look(arguments.sources, *arguments.overrides, images=arguments.images, page=page, tell=tell, **reading)
    if arguments.json:
        print_json(found)
    else:
        say(f"{found}\npage       {page}{replaced}")
    return 0


def _beside(sources: Sequence[str], overrides: Sequence[str]) -> Path:
    """Returns where the page goes: beside the report of a configuration, else into the current folder."""
    return Path(load_config(sources[0], overrides).run.output, PAGE) if _is_config(sources) else Path(PAGE)


def _is_config(sources: Sequence[str]) -> bool:
    return len(sources) == 1 and sources[0].endswith(CONFIGS)


def look(
    sources: str | Path | Sequence[str | Path],
    *overrides: str,
    images: int = IMAGES,
    page: str | Path | None = None,
    tell: Callable[[str], object] = lambda _: None,
    **reading: str,
) -> Look:
    """Looks at a list before training. Fetches the images of a sample; stores nothing.

    Args:
        sources: A list as in ``source.paths``, or several; or one configuration (.yaml), whose rules then apply.
        overrides: Values in place of the configuration's, such as "curation.max_caption=2000".
        images: Rows, drawn at random, whose images are fetched; at most 10,000.
        page: HTML file to write or replace; None writes none.
        tell: Function that is called with a line about the fetch.
        reading: Fields of ``source`` for a list that is not a configuration: image_column, caption_column,
            image_folder, encoding.

    Raises:
        UserError: for a list or a configuration that cannot be read, and a page that cannot be written.

    Examples:
        >>> found = unclip.look("pairs.csv", images=10)
        >>> cut = found.captions.cut["tiny"]
    """
    paths = [os.fspath(sources)] if isinstance(sources, str | Path) else [os.fspath(source) for source in sources]
    if not 0 <= images <= MOST_IMAGES:
        raise UserError(f"images {images:,}: look at 0 to {MOST_IMAGES:,} images")
    journal = EMPTY
    laid_over: Sequence[str] | None = overrides
    if _is_config(paths):
        if reading:
            raise UserError(f"{paths[0]} is a configuration: set source.{next(iter(reading))} there")
        config, laid_over = load_config(paths[0], overrides), None
        seen = preview(config.source)
        journal = replace(read_journal(open_store(config.store), config.project), retries=())
    else:
        named = {"project": "look", "store": "look", "source": {"paths": [*map(pinned, paths)], **reading}}
        named["clip"] = {"weights": CLIP_WEIGHTS}  # which any list allows
        source = load_config(named, overrides).source
        seen = preview_named(source)
        config = load_config(propose(source, seen, bool(this_machine(RaySettings()).gpus))[1], overrides)
    with tempfile.TemporaryDirectory(prefix="unclip-look-") as folder:
        store = open_store(folder)
        found, sample = look_at(config, seen, store, images, laid_over, journal, tell)
        if page is not None:
            from pipeline.look.page import write_look

            write_look(found, sample, store, Path(page))
    return found
