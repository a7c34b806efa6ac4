"""The kinds of ``unclip edit``: each returns images to show as a strip, with progress over all steps.

The mathematics is in models.cascade and models.comparison. Sections are those of Ramesh et al. 2022.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from models import reverse
from models.cascade import Generation, UnCLIP
from models.comparison import compare_priors, priors_of
from models.sampling_config import SamplingConfig
from models.tokens import check_captions
from models.view import view
from pipeline.progress import Progress
from pipeline.sampling.drawing import decode_steps, prior_steps

PAPER_COUNTS, PAPER_CODES = (20, 30, 40, 80, 120, 160, 200, 320), 320  # figure 7
MOST_DB = 100.0  # equal images have an infinite PSNR
WIDEST = 2560  # px of a row of a strip
SMALLEST = 128  # px of a tile; pixels of smaller images are repeated
GAP = 4  # px of white between two tiles
FRAME_MS, END_MS = 100, 600  # of a frame of an animation, and of its first and last
DESCRIPTION = 0x010E  # EXIF: ImageDescription
Options = Mapping[str, Any]
ProgressDisplay = bool | Callable[[str, int, int], None]
"""True for a line of progress, False for none, or a function of a model's name, the steps done and all steps."""


class EditSettings(NamedTuple):
    """Holds the seed, the sampling options and the display of progress of an edit."""

    seed: int
    options: Options
    watch: ProgressDisplay = True


@dataclass(frozen=True)
class Edit:
    """Holds images, uint8 [s, s, 3], a name for each, and their sampling options."""

    images: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    settings: Mapping[str, Any]


def variations(
    unclip: UnCLIP, image: Image.Image, count: int, eta: float, caption: str | None, settings: EditSettings
) -> Edit:
    """Returns the image, then ``count`` others of its embedding, with consecutive seeds (section 3.1)."""
    sampling, seeds = unclip.manipulation_sampling(dict(settings.options)), range(settings.seed, settings.seed + count)
    with show_progress("variations", unclip, sampling, settings.watch, inversions=1) as progress:
        inversion = unclip.invert([image], _listed(caption), progress, **settings.options)
        made = unclip.variations(inversion, seeds, eta, progress, **settings.options)
    names = ("the image", *(f"seed {s}" for s in seeds))
    return _edit([_like(image, made), *_images(made)], names, sampling)


def interpolation(unclip: UnCLIP, first: Image.Image, second: Image.Image, count: int, settings: EditSettings) -> Edit:
    """Returns ``count`` images from the first, reconstructed, to the second, reconstructed (section 3.2).

    Raises ValueError on a count below 2.
    """
    if count < 2:
        raise ValueError(f"an interpolation takes 2 or more images, got {count}")
    shares = [i / (count - 1) for i in range(count)]
    sampling = unclip.manipulation_sampling(dict(settings.options))
    with show_progress("interpolation", unclip, sampling, settings.watch, inversions=2) as progress:
        a, b = (unclip.invert([image], None, progress, **settings.options) for image in (first, second))
        made = unclip.interpolate(a, b, shares, settings.seed, progress, **settings.options)
    return _edit(_images(made), [f"{share:.0%}" for share in shares], sampling)


def text_difference(
    unclip: UnCLIP, image: Image.Image, before: str, after: str, shares: Sequence[float], settings: EditSettings
) -> Edit:
    """Returns the image turned by each share towards the difference of two captions (section 3.3)."""
    sampling = unclip.manipulation_sampling(dict(settings.options))
    check_captions([before, after])
    with show_progress("text difference", unclip, sampling, settings.watch, inversions=1) as progress:
        inversion = unclip.invert([image], None, progress, **settings.options)
        made = unclip.text_difference(inversion, before, after, shares, settings.seed, progress, **settings.options)
    return _edit(_images(made), [f"turned by {share:.3g}" for share in shares], sampling)


def reconstruction(unclip: UnCLIP, image: Image.Image, caption: str | None, settings: EditSettings) -> Edit:
    """Returns the image and its reconstruction from its latents, with the PSNR at every size (section 3)."""
    sampling = unclip.manipulation_sampling(dict(settings.options))
    with show_progress("reconstruction", unclip, sampling, settings.watch, inversions=1) as progress:
        inversion = unclip.invert([image], _listed(caption), progress, **settings.options)
        made = unclip.reconstruct(inversion, settings.seed, progress, **settings.options)
    near = [f"{_psnr(made.images[side], image):.1f} dB at {side} px" for side in made.images]
    names = ("the image", f"its reconstruction, PSNR {', '.join(near)}")
    return _edit([_like(image, made), *_images(made)], names, sampling)


def components(unclip: UnCLIP, image: Image.Image, counts: Sequence[int] | None, settings: EditSettings) -> Edit:
    """Returns images of the first principal components, of the whole embedding, and the image (section 4, figure 7).

    All are drawn from one noise. ``counts`` None takes the paper's, in proportion to the components there are.
    """
    sampling = unclip.manipulation_sampling(dict(settings.options))
    codes = unclip.codec.codes if unclip.codec else PAPER_CODES
    counts = counts or sorted({max(1, round(n * codes / PAPER_CODES)) for n in PAPER_COUNTS})
    embedding = unclip.embed([image])
    with show_progress("components", unclip, sampling, settings.watch, decodings=2) as progress:
        made = unclip.principal_components(embedding, counts, settings.seed, progress, **settings.options)
        whole = unclip.decode(embedding, None, [settings.seed], sampling, progress)
    near = cosine_similarity(made.embedding, embedding)
    names = [f"{n} of {codes} components, cosine {c:.3f}" for n, c in zip(counts, near.tolist(), strict=True)]
    images = [*_images(made), *_images(whole), _like(image, made)]
    return _edit(images, [*names, "the whole embedding", "the image"], sampling)


def priors(unclip: UnCLIP, caption: str, image: Image.Image | None, settings: EditSettings) -> Edit:
    """Returns a caption decoded from each prior's embedding, its text's and the image's (section 5.1, figure 8)."""
    sampling = unclip.sampling_with(dict(settings.options))
    drawn = sum(prior_steps(unclip, dataclasses.asdict(sampling), option) for _, option in priors_of(unclip))
    with show_progress("priors", unclip, sampling, settings.watch, more=drawn) as progress:
        compared = compare_priors(unclip, caption, settings.seed, image, progress, **settings.options)
    made = compared.generation
    near = {"caption": cosine_similarity(made.embedding, compared.text).tolist()}
    if image is not None:  # its embedding is the last
        near["image"] = cosine_similarity(made.embedding, made.embedding[-1:]).tolist()
    names = [
        f"{name}, cosine {', '.join(f'{values[i]:.3f} to the {what}' for what, values in near.items())}"
        for i, name in enumerate(compared.names)
    ]
    return _edit(_images(made), names, sampling)


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


def _edit(images: Sequence[np.ndarray], names: Sequence[str], sampling: SamplingConfig) -> Edit:
    return Edit(tuple(images), tuple(names), dataclasses.asdict(sampling))


def _listed(caption: str | None) -> list[str] | None:
    return None if caption is None else [caption]


def _images(made: Generation) -> list[np.ndarray]:
    return list(made.image.numpy())


def _like(image: Image.Image, made: Generation) -> np.ndarray:
    """Returns the image at the side of what was made."""
    return view(image, max(made.images))


def _psnr(made: torch.Tensor, image: Image.Image) -> float:
    """Returns the PSNR in dB of one image, uint8 [1, s, s, 3], at most MOST_DB."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # its import takes seconds

    truth = torch.tensor(view(image, made.shape[1]))[None]
    return min(MOST_DB, float(peak_signal_noise_ratio(made.float(), truth.float(), 255.0)))


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


def animation(images: Sequence[np.ndarray], text: Mapping[str, str]) -> bytes:
    """Returns images, uint8 [s, s, 3], as a lossless WebP that goes forth and back for ever.

    ``n`` images become 2 n - 2 frames; both ends stay for longer. An image that equals the one before adds its
    time to it. ``text`` is in the EXIF image description, as JSON.
    """
    forth = [Image.fromarray(enlarged(image)) for image in images]
    frames = forth + forth[-2:0:-1]
    times = [END_MS if frame in (0, len(forth) - 1) else FRAME_MS for frame in range(len(frames))]
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps(dict(text))
    out = io.BytesIO()
    frames[0].save(
        out, "WEBP", save_all=True, append_images=frames[1:], duration=times, loop=0, lossless=True, exif=exif
    )
    return out.getvalue()
