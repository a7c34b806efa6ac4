"""``unclip edit KIND ...``: change images of your own with a finished bundle, and show the result as a strip."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.bundles import find_bundle
from jobs.drawing import file_name, one_file, plain_errors, read_options, writable, write_png
from jobs.output import say
from models.sampling_config import own_names
from pipeline.data.pairs.decoding import open_image
from pipeline.errors import UserError
from pipeline.sampling.recipe import OPERATIONS, ImageRecipe, describe

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.sampling.edits import Edit

SIZE = 256  # px unless asked for otherwise: a strip of 1024 px images takes minutes on a CPU
STRIPS = ("nearest", "reconstruct", "components", "priors")  # the kinds whose images mean nothing alone
ANIMATIONS = (".webp", ".gif")


def main(arguments: argparse.Namespace) -> int:
    """Runs ``unclip edit``."""
    recipe = _described(arguments)
    kinds = (".png", *ANIMATIONS) if recipe.shares else (".png",)
    single = one_file(arguments.to, 1, kinds)
    if arguments.to and not single and recipe.operation in STRIPS:
        raise UserError(f"--to {arguments.to}: {recipe.operation} makes one strip; name a .png file")
    files = _named(arguments)
    images = [open_input(recipe, i, file) for i, file in enumerate(files)]
    bundle = find_bundle(arguments.source)
    where = writable(arguments.to or bundle.output / "edits", single)
    folder = bundle.folder

    from pipeline.sampling.drawing import open_bundle, refusals
    from pipeline.sampling.edits import make_edit
    from pipeline.sampling.operations import check_images, resolve_sampling, with_images

    with refusals():
        check_images(recipe, images)
        unclip = open_bundle(folder, arguments.device)
        recipe = replace(recipe, options={"size": min(SIZE, resolve_sampling(unclip, recipe).size), **recipe.options})
        edit = make_edit(unclip, recipe, images, training=bundle.training)
    done = with_images(recipe.drawn(edit.settings, bundle.key), images, [file.name for file in files])
    if arguments.to and not single:
        for row, pixels in zip(done.rows, edit.images[edit.given :], strict=True):
            one = done.of(row)
            say(write_png(where / f"{_name(one, files)}.png", pixels, one))
        return 0
    suffix = ".webp" if vars(arguments).get("animate") else ".png"
    path = where if single else where / f"{_name(replace(done, strip=True), files)}{suffix}"
    write_strip(path, edit, done)
    return 0


def open_input(recipe: ImageRecipe, i: int, file: Path) -> Image:
    """Opens image ``i`` of those that a recipe begins with; the mask of ``inpaint`` as how opaque it is."""
    return open_image(file, opacity=recipe.operation == "inpaint" and i == 1)


def write_strip(path: Path, edit: Edit, recipe: ImageRecipe) -> None:
    """Writes a strip, or an animation where the file's name says so, with its recipe, and says what it shows."""
    from pipeline.sampling.edits import animation, strip

    whole, names = replace(recipe, strip=True), {"images": json.dumps(edit.names)}
    if path.suffix.lower() in ANIMATIONS:
        path.write_bytes(animation(edit.images, {**whole.chunks(), **names}, path.suffix[1:].lower()))
    else:
        write_png(path, strip(edit.images), whole, names)
    say(path)
    for i, name in enumerate(edit.names, 1):
        say(f"  {i}: {name}")


def _described(arguments: argparse.Namespace) -> ImageRecipe:
    """Returns the recipe that the words describe. Raises UserError for what no bundle can draw."""
    values, kind = vars(arguments), arguments.kind
    words: dict[str, Any] = {
        name: values[name] for name in ("n", "strength", "seed", "eta", "before") if name in values
    }
    words["caption"] = values.get("after") if kind == "change" else values.get("caption")
    turned = OPERATIONS[kind].turned
    given = {"shares": (1.0,) if turned else (), "counts": _counts(values.get("counts"))}
    with plain_errors():
        recipe = describe(kind, {**words, **own_names(read_options(arguments.overrides))}, **given)
    if turned and len(recipe.shares) < 2:
        raise UserError(f"n is 1: {kind} makes 2 images or more, the first of which is the given one")
    return recipe


def _counts(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise UserError(f"--counts {text}: write whole numbers with commas, such as 20,30,40") from None


def _named(arguments: argparse.Namespace) -> list[Path]:
    """Returns the images that the arguments name."""
    values = vars(arguments)
    return [values[name] for name in ("image", "first", "second", "mask") if values.get(name)]


def _name(recipe: ImageRecipe, files: Sequence[Path]) -> str:
    said = [*(file.stem for file in files), recipe.caption or ""]
    return f"{recipe.operation}-{file_name(' '.join(said), asdict(recipe), recipe.seed)}"
