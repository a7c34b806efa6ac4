"""Draws what a recipe describes, with a cascade in this process: commands, Python and the server draw through here.

The mathematics is in models.cascade. Sections are those of Ramesh et al. 2022.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image

from models import reverse
from models.cascade import Generation, Inversion, UnCLIP
from models.inpainting import KnownRegion, mask_flaw
from models.sampling_config import SamplingConfig
from models.tokens import check_captions
from models.view import view
from pipeline.progress import Progress
from pipeline.sampling.drawing import decode_steps, prior_steps
from pipeline.sampling.recipe import FROM_NOISE, ImageRecipe, InputImage, Row, check_recipe, pixels_hash

BATCH = 8  # images that are drawn at once, unless a caller says otherwise
ProgressDisplay = bool | Callable[[str, int, int], None]
"""True for a line of progress, False for none, or a function of a model's name, the steps done and all steps."""


def resolve_sampling(unclip: UnCLIP, recipe: ImageRecipe) -> SamplingConfig:
    """Returns all sampling options of a recipe. Raises ValueError for those that the bundle cannot take."""
    options: dict[str, object] = {**recipe.options}
    from_noise = recipe.operation in FROM_NOISE
    return unclip.sampling_with(options) if from_noise else unclip.manipulation_sampling(options)


def check_images(recipe: ImageRecipe, images: Sequence[Image.Image]) -> None:
    """Raises ValueError for images, or a caption, that a recipe's operation cannot begin with."""
    check_recipe(recipe, len(images))
    if recipe.operation == "inpaint" and (flaw := mask_flaw(*images)):
        raise ValueError(f"the mask {flaw}")


def find_latents(
    unclip: UnCLIP, recipe: ImageRecipe, images: Sequence[Image.Image], progress: reverse.Progress = reverse.silent
) -> list[Inversion]:
    """Returns the latents of the images that an operation begins with; none where it begins with noise."""
    if recipe.operation in FROM_NOISE:
        return []
    captions = [recipe.caption] if recipe.caption and recipe.operation in ("vary", "reconstruct") else None
    return [unclip.invert([image], captions, progress, **recipe.options) for image in images]


def draw_rows(
    unclip: UnCLIP,
    recipe: ImageRecipe,
    rows: Sequence[Row],
    images: Sequence[Image.Image] = (),
    latents: Sequence[Inversion] = (),
    progress: reverse.Progress = reverse.silent,
) -> Generation:
    """Draws some images of a recipe at once. Raises ValueError for what the bundle cannot draw.

    Args:
        unclip: Models to draw with.
        recipe: Operation and options; caption, seeds and shares are those of the rows.
        rows: Images to draw, of one caption where the operation begins with an image.
        images: Images that the operation begins with.
        latents: Latents of these images, as ``find_latents`` returns them.
        progress: Function that is called after every step.
    """
    options, seeds, shares = recipe.options, [row.seed for row in rows], [row.share for row in rows]
    if recipe.operation in ("draw", "inpaint"):
        known = KnownRegion(*images) if images else None
        return unclip.generate([row.caption or "" for row in rows], seeds, progress, known, **options)
    if recipe.operation == "vary":
        return unclip.variations(latents[0], seeds, recipe.eta, progress, **options)
    if recipe.operation == "interpolate":
        return unclip.interpolate(latents[0], latents[1], shares, seeds[0], progress, **options)
    if recipe.operation == "change":
        before, after = recipe.before or "", rows[0].caption or ""
        return unclip.text_difference(latents[0], before, after, shares, seeds[0], progress, **options)
    raise ValueError(f"{recipe.operation} makes a figure, not images")


def draw_recipe(
    unclip: UnCLIP,
    recipe: ImageRecipe,
    images: Sequence[Image.Image] = (),
    watch: ProgressDisplay = True,
    batch: int = BATCH,
    rows: Sequence[Row] | None = None,
) -> list[np.ndarray]:
    """Returns the images of a recipe, uint8 [side, side, 3] each.

    Args:
        unclip: Models to draw with.
        recipe: Recipe of the images.
        images: Images that its operation begins with.
        watch: Display of progress.
        batch: Images that are drawn at once; what is drawn beside an image changes it by rounding.
        rows: Images to draw in place of the recipe's own.

    Raises:
        ValueError: The bundle cannot draw that, or images or captions are missing.
    """
    check_images(recipe, images)
    rows = recipe.rows if rows is None else rows
    sampling = resolve_sampling(unclip, recipe)
    check_captions([text for text in (recipe.before, *(row.caption for row in rows)) if text is not None])
    starts = range(0, len(rows), batch)
    prior = prior_steps(unclip, dataclasses.asdict(sampling), sampling.prior)
    from_noise = recipe.operation in FROM_NOISE
    work = {"more": prior * len(starts)} if from_noise else {"inversions": len(images)}
    pixels: list[np.ndarray] = []
    with show_progress("drawing", unclip, sampling, watch, decodings=len(starts), **work) as progress:
        latents = find_latents(unclip, recipe, images, progress)
        for start in starts:
            made = draw_rows(unclip, recipe, rows[start : start + batch], images, latents, progress)
            pixels += list(made.image.numpy())
    return [made_smaller(image, recipe.side) for image in pixels]


def made_smaller(pixels: np.ndarray, side: int) -> np.ndarray:
    """Returns an image, uint8 [s, s, 3], at a smaller side; 0, or a side that is not smaller, leaves it as it is."""
    return view(Image.fromarray(pixels), side) if 0 < side < len(pixels) else pixels


def with_images(recipe: ImageRecipe, images: Sequence[Image.Image], names: Sequence[str] = ()) -> ImageRecipe:
    """Returns a recipe that names the images it begins with, by their pixels and the names of their files."""
    named = [*names, *[""] * (len(images) - len(names))]
    given = [InputImage(pixels_hash(image), name) for image, name in zip(images, named, strict=True)]
    return dataclasses.replace(recipe, images=tuple(given))


@contextmanager
def show_progress(
    name: str,
    unclip: UnCLIP,
    sampling: SamplingConfig,
    watch: ProgressDisplay,
    *,
    inversions: int = 0,
    decodings: int = 1,
    more: int = 0,
) -> Iterator[reverse.Progress]:
    """Yields a function that shows progress over all steps of ``inversions`` and ``decodings`` and ``more``."""
    if watch is not True:
        # Models that make images pass an estimate as a fourth argument.
        yield (lambda *step: watch(*step[:3])) if watch else reverse.silent
        return
    steps = inversions * sampling.decoder_steps + decodings * decode_steps(unclip, dataclasses.asdict(sampling)) + more
    with Progress(name, steps, "steps") as line:
        yield lambda stage, *_: line.advance(1, stage)
