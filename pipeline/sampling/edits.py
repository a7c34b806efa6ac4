"""The kinds of ``unclip edit``: images to show as a strip, each with a name, with progress over all steps.

Sections are those of Ramesh et al. 2022.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from models.cascade import UnCLIP
from models.comparison import compare_priors, priors_of
from models.pixels import from_uint8, psnr
from models.sampling_config import SamplingConfig
from models.tokens import check_captions
from models.view import view
from pipeline.errors import UserError
from pipeline.sampling.drawing import prior_steps
from pipeline.sampling.nearest import NO_INDEX, SHOWN, TrainingImages, web_address
from pipeline.sampling.operations import (
    ProgressDisplay,
    draw_recipe,
    find_latents,
    resolve_sampling,
    show_progress,
)
from pipeline.sampling.recipe import ImageRecipe, check_recipe

PAPER_COUNTS, PAPER_CODES = (20, 30, 40, 80, 120, 160, 200, 320), 320  # figure 7
WIDEST = 2560  # px of a row of a strip
SMALLEST = 128  # px of a tile; pixels of smaller images are repeated
GAP = 4  # px of white between two tiles
FRAME_MS, END_MS = 100, 600  # of a frame of an animation, and of its first and last
DESCRIPTION = 0x010E  # EXIF: ImageDescription
Images = Sequence[Image.Image]


@dataclass(frozen=True)
class Edit:
    """Holds images, uint8 [s, s, 3], a name for each, their sampling options, and how many of them were given."""

    images: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    settings: Mapping[str, Any]
    given: int = 0


def make_edit(
    unclip: UnCLIP,
    recipe: ImageRecipe,
    images: Images,
    watch: ProgressDisplay = True,
    training: Callable[[], TrainingImages] | None = None,
) -> Edit:
    """Returns what a recipe describes; ``training`` finds the images that the bundle was trained on, for ``nearest``.

    Raises ValueError for what the bundle cannot draw, and UserError where its training images are not known.
    """
    check_recipe(recipe, len(images))
    if recipe.operation == "nearest":
        if training is None:
            raise UserError(NO_INDEX)
        return nearest(unclip, recipe, images, training())
    if recipe.operation in FIGURES:
        return FIGURES[recipe.operation](unclip, recipe, images, watch)
    drawn = draw_recipe(unclip, recipe, images, watch)
    names = {
        "interpolate": [f"{row.share:.0%}" for row in recipe.rows],
        "change": [f"turned by {row.share:.3g}" for row in recipe.rows],
    }.get(recipe.operation, [f"seed {row.seed}" for row in recipe.rows])
    if recipe.operation in ("vary", "inpaint"):  # shown beside what they were made of
        drawn, names = [view(images[0], len(drawn[0])), *drawn], ["the image", *names]
    return _edit(drawn, names, resolve_sampling(unclip, recipe), len(names) - len(recipe.rows))


def nearest(unclip: UnCLIP, recipe: ImageRecipe, images: Images, training: TrainingImages) -> Edit:
    """Returns an image and the training images nearest to it; a white one where there is none to be shown."""
    found = training.nearest(unclip.embed(images).cpu().numpy(), recipe.n)
    side = SHOWN.image_size
    shown = [
        np.full((side, side, 3), 255, np.uint8) if each.image is None else view(each.image, side) for each in found
    ]
    names = [
        ", ".join(
            filter(
                None,
                (
                    f"{each.similarity:.1%} alike",
                    each.license,
                    each.attribution,
                    web_address(each.url) or (each.url or "").rpartition("/")[2],  # a strip travels: no folders
                    " ".join(each.caption.split()),
                ),
            )
        )
        for each in found
    ]
    return _edit([view(images[0], side), *shown], ["the image", *names], resolve_sampling(unclip, recipe), 1)


def reconstruction(unclip: UnCLIP, recipe: ImageRecipe, images: Images, watch: ProgressDisplay) -> Edit:
    """Returns the image and its reconstruction from its latents, with the PSNR at every size (section 3)."""
    sampling = resolve_sampling(unclip, recipe)
    with show_progress("reconstruction", unclip, sampling, watch, inversions=1) as progress:
        [inversion] = find_latents(unclip, recipe, images, progress)
        made = unclip.reconstruct(inversion, recipe.seed, progress, **recipe.options)
    near = [f"{_psnr(made.images[side], images[0]):.1f} dB at {side} px" for side in made.images]
    names = ("the image", f"its reconstruction, PSNR {', '.join(near)}")
    return _edit([view(images[0], max(made.images)), *made.image.numpy()], names, sampling, 1)


def components(unclip: UnCLIP, recipe: ImageRecipe, images: Images, watch: ProgressDisplay) -> Edit:
    """Returns images of the first principal components, of the whole embedding, and the image (section 4, figure 7).

    All are drawn from one noise. No ``counts`` take the paper's, in proportion to the components there are.
    """
    sampling = resolve_sampling(unclip, recipe)
    codes = unclip.codec.codes if unclip.codec else PAPER_CODES
    counts = recipe.counts or sorted({max(1, round(n * codes / PAPER_CODES)) for n in PAPER_COUNTS})
    embedding = unclip.embed(images)
    with show_progress("components", unclip, sampling, watch, decodings=2) as progress:
        made = unclip.principal_components(embedding, counts, recipe.seed, progress, **recipe.options)
        whole = unclip.decode(embedding, None, [recipe.seed], sampling, progress)
    near = cosine_similarity(made.embedding, embedding)
    names = [f"{n} of {codes} components, cosine {c:.3f}" for n, c in zip(counts, near.tolist(), strict=True)]
    shown = [*made.image.numpy(), *whole.image.numpy(), view(images[0], max(made.images))]
    return _edit(shown, [*names, "the whole embedding", "the image"], sampling)


def priors(unclip: UnCLIP, recipe: ImageRecipe, images: Images, watch: ProgressDisplay) -> Edit:
    """Returns a caption decoded from each prior's embedding, its text's and the image's (section 5.1, figure 8)."""
    sampling, caption = resolve_sampling(unclip, recipe), recipe.caption or ""
    check_captions([caption])
    drawn = sum(prior_steps(unclip, dataclasses.asdict(sampling), option) for _, option in priors_of(unclip))
    with show_progress("priors", unclip, sampling, watch, more=drawn) as progress:
        image = images[0] if images else None
        compared = compare_priors(unclip, caption, recipe.seed, image, progress, **recipe.options)
    made = compared.generation
    near = {"caption": cosine_similarity(made.embedding, compared.text).tolist()}
    if images:  # its embedding is the last
        near["image"] = cosine_similarity(made.embedding, made.embedding[-1:]).tolist()
    names = [
        f"{name}, cosine {', '.join(f'{values[i]:.3f} to the {what}' for what, values in near.items())}"
        for i, name in enumerate(compared.names)
    ]
    return _edit(made.image.numpy(), names, sampling)


FIGURES = {"reconstruct": reconstruction, "components": components, "priors": priors}
"""The operations that compare: they make a strip, and none of its images alone."""


def _edit(images: Any, names: Sequence[str], sampling: SamplingConfig, given: int = 0) -> Edit:
    return Edit(tuple(images), tuple(names), dataclasses.asdict(sampling), given)


def _psnr(made: torch.Tensor, image: Image.Image) -> float:
    """Returns the PSNR in dB of one image, uint8 [1, s, s, 3]."""
    truth = torch.tensor(view(image, made.shape[1]))[None]
    return float(psnr(from_uint8(made), from_uint8(truth)))


def strip(images: Sequence[np.ndarray]) -> np.ndarray:
    """Returns square images of one side, uint8 [s, s, 3], as one, uint8 [h, w, 3], in reading order, rows equally long.

    The last row may be shorter, ending in white.
    """
    tiles = [enlarged(image) for image in images]
    step = len(tiles[0]) + GAP
    rows = ceil(len(tiles) / max(1, (WIDEST + GAP) // step))
    columns = ceil(len(tiles) / rows)
    whole = np.full((rows * step - GAP, columns * step - GAP, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * step, i % columns * step
        whole[top : top + len(tile), left : left + len(tile)] = tile
    return whole


def enlarged(image: np.ndarray) -> np.ndarray:
    """Returns an image with every pixel repeated until its side is at least SMALLEST; a larger one stays."""
    times = ceil(SMALLEST / len(image))
    return image.repeat(times, 0).repeat(times, 1)


def animation(images: Sequence[np.ndarray], text: Mapping[str, str], kind: str = "webp") -> bytes:
    """Returns images, uint8 [s, s, 3], as a lossless WebP, or a GIF, that goes forth and back for ever.

    ``n`` images become 2 n - 2 frames; both ends stay for longer. An image that equals the one before adds its
    time to it. ``text`` is in the EXIF image description, or the comment of a GIF, as JSON.
    """
    forth = [Image.fromarray(enlarged(image)) for image in images]
    frames = forth + forth[-2:0:-1]
    times = [END_MS if frame in (0, len(forth) - 1) else FRAME_MS for frame in range(len(frames))]
    about, out = json.dumps(dict(text)), io.BytesIO()
    how: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
    if kind == "gif":
        frames[0].save(out, "GIF", comment=about.encode(), **how)
    else:
        exif = Image.Exif()
        exif[DESCRIPTION] = about
        frames[0].save(out, "WEBP", lossless=True, exif=exif, **how)
    return out.getvalue()
