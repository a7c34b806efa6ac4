"""``unclip redraw IMAGE``: draw an image again from the recipe that it carries, as it was or with other values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.bundles import Bundle, find_bundle, find_cached
from jobs.drawing import NAME_HASH, file_name, one_file, plain_errors, read_options, writable, write_png
from jobs.edit import ANIMATIONS, STRIPS, open_input, write_strip
from jobs.output import say
from pipeline.data.pairs.decoding import open_image
from pipeline.data.pairs.image import MAX_BYTES
from pipeline.errors import UserError
from pipeline.graph.artifacts import load_artifact
from pipeline.local import read_local
from pipeline.sampling.recipe import ImageRecipe, change_recipe, pixels_hash, read_recipe, recipe_differences
from pipeline.store.records import digest

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SAME = "the same pixels"
NAMED = re.compile(rf"-[0-9a-f]{{{NAME_HASH}}}-\d+$")  # the end of what ``file_name`` returns


def main(arguments: argparse.Namespace) -> int:
    """Runs ``unclip redraw``."""
    path: Path = arguments.recipe
    try:
        data = read_local(path, MAX_BYTES)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or 'too large'}); name a PNG") from None
    old = read_recipe(data, str(path))
    words = {"n": arguments.n, "seed": arguments.seed, "caption": arguments.caption}
    with plain_errors():
        said = {name: value for name, value in words.items() if value is not None}
        new = change_recipe(old, {**said, **read_options(arguments.overrides)})
    images = _inputs(path, new, arguments.images)
    whole = new.strip or new.operation in STRIPS
    kinds = (".png", *(ANIMATIONS if whole and new.shares else ()))
    single = one_file(arguments.to, 1 if whole else len(new.rows), kinds)
    bundle = _bundle(old, arguments.source)
    where = writable(arguments.to or bundle.output / "redrawn", single)
    folder = bundle.folder

    from pipeline.sampling.drawing import open_bundle, refusals
    from pipeline.sampling.edits import make_edit
    from pipeline.sampling.operations import check_images, draw_recipe, resolve_sampling, with_images

    key, compared = old.bundle if _drew(bundle, old) else bundle.key, ""
    with refusals():
        check_images(new, images)
        unclip = open_bundle(folder, arguments.device)
        done = new.drawn(asdict(resolve_sampling(unclip, new)), key)
        done = with_images(done, images, [each.name for each in new.images])
        if whole:
            edit = make_edit(unclip, new, images, training=bundle.training)
            write_strip(where if single else where / _name(path, done), edit, done)
        else:
            before, drawn = open_image(path), draw_recipe(unclip, new, images)
            for row, pixels in zip(done.rows, drawn, strict=True):
                one = done.of(row)
                say(write_png(where if single else where / _name(path, one), pixels, one))
            if len(drawn) == 1:
                compared = _compared(drawn[0], before)
                say(f"  {compared}")
    for line in recipe_differences(old, done if whole or len(done.rows) > 1 else done.of(done.rows[0])):
        say(f"  {line}")
    if old.bundle and old.bundle != key and compared != SAME:
        say(
            f"  bundle {old.bundle[:12]} drew it: name its run, project or release with --from. A copy has another "
            f"key, here {key[:12]}, and draws the same unless its weights are in half precision"
        )
    return 0


def _name(path: Path, recipe: ImageRecipe) -> str:
    """Returns a name for an image that was drawn from this recipe in place of the one in a file."""
    return f"{file_name(NAMED.sub('', path.stem), asdict(recipe), recipe.seed)}.png"


def _drew(bundle: Bundle, recipe: ImageRecipe) -> bool:
    # A copied folder goes by its files, of which a bundle in a store has a digest, too.
    return recipe.bundle in (bundle.key, digest(bundle.blobs))


def _bundle(recipe: ImageRecipe, source: str | None) -> Bundle:
    """Returns the bundle of ``--from``; without it the one that drew, if it is still here, or the newest run's.

    It is looked for in the store of the newest run, and among the bundles that were fetched. Raises UserError.
    """
    try:
        found = find_bundle(source)
    except UserError:
        if source is None and (cached := find_cached(recipe.bundle)):
            return cached
        raise
    if source is None and not _drew(found, recipe) and recipe.bundle:
        older = load_artifact(found.store, "bundle", recipe.bundle) if found.store and not found.files else None
        if older is not None:
            return replace(found, key=older.key, blobs=older.blobs)
        return find_cached(recipe.bundle) or found
    return found


def _inputs(path: Path, recipe: ImageRecipe, named: Sequence[Path]) -> list[Image]:
    """Returns the images that a recipe begins with: the ``named`` ones, else those of its names beside the image.

    Raises UserError for one that is not there.
    """
    if len(named) > len(recipe.images):
        raise UserError(f"{path} begins with {len(recipe.images)} images, and {len(named)} are named; leave some out")
    found = []
    for i, wanted in enumerate(recipe.images):
        # The name is a stranger's: only a file with the very pixels is taken, and only from beside the image.
        plain = Path(wanted.name).name == wanted.name != ""
        near = [folder / wanted.name for folder in (path.parent, Path()) if plain]
        for file in [named[i]] if i < len(named) else [each for each in near if each.is_file()]:
            image = open_input(recipe, i, file)
            if i < len(named) or pixels_hash(image) == wanted.sha256:
                found.append(image)
                break
        else:
            what = wanted.name if plain else f"an image whose pixels have the sha256 {wanted.sha256[:12]}"
            raise UserError(f"{path} was made from {what}, which is not beside it; name it with --image FILE")
    return found


def _compared(pixels: np.ndarray, image: Image) -> str:
    """Returns how the new image differs from the old one."""
    import numpy as np

    before = np.asarray(image)
    if before.shape != pixels.shape:
        return f"{pixels.shape[0]} px in place of {before.shape[0]}"
    apart = np.abs(before.astype(int) - pixels).max(-1)
    share, most = np.mean(apart > 0), apart.max()
    return f"{share:.1%} of its pixels differ, by {most} of 255 at most" if most else SAME
