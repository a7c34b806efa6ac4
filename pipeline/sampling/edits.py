"""Changed images as strips: what each kind of ``unclip edit`` shows, with progress over all steps.

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
MOST_DB = 100.0
WIDEST = 2560  # px of a strip; after that it goes on in another row
SMALLEST = 128  # px of a tile; smaller images are shown with every pixel as a square of pixels
GAP = 4  # px of white between two tiles
FRAME_MS, END_MS = 100, 600
DESCRIPTION = 0x010E  # EXIF: ImageDescription
Options = Mapping[str, Any]
Watch = bool | Callable[[str, int, int], None]
"""Whether a line of progress is shown; or what is called after every step with a model's name, steps done and steps."""


class How(NamedTuple):
    """Says with which seed and which sampling options images are changed, and how progress is shown."""

    seed: int
    options: Options
    watch: Watch = True


@dataclass(frozen=True)
class Edit:
    """Images, uint8 [s, s, 3], what each of them is, and how they were sampled."""

    images: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    settings: Mapping[str, Any]


def variations(unclip: UnCLIP, image: Image.Image, count: int, eta: float, caption: str | None, how: How) -> Edit:
    """Follows section 3.1: the image, then ``count`` others of its embedding, with consecutive seeds."""
    sampling, seeds = unclip.manipulation_sampling(dict(how.options)), range(how.seed, how.seed + count)
    with watched("variations", unclip, sampling, how.watch, inversions=1) as progress:
        inversion = unclip.invert([image], _listed(caption), progress, **how.options)
        made = unclip.variations(inversion, seeds, eta, progress, **how.options)
    names = ("the image", *(f"seed {s}" for s in seeds))
    return _edit([_like(image, made), *_images(made)], names, sampling)


def interpolation(unclip: UnCLIP, first: Image.Image, second: Image.Image, count: int, how: How) -> Edit:
    """Follows section 3.2: ``count`` images from the first, reconstructed, to the second, reconstructed.

    Raises ValueError on a count below 2.
    """
    if count < 2:
        raise ValueError(f"an interpolation takes 2 or more images, got {count}")
    shares = [i / (count - 1) for i in range(count)]
    sampling = unclip.manipulation_sampling(dict(how.options))
    with watched("interpolation", unclip, sampling, how.watch, inversions=2) as progress:
        a, b = (unclip.invert([image], None, progress, **how.options) for image in (first, second))
        made = unclip.interpolate(a, b, shares, how.seed, progress, **how.options)
    return _edit(_images(made), [f"{share:.0%}" for share in shares], sampling)


def text_difference(
    unclip: UnCLIP, image: Image.Image, before: str, after: str, shares: Sequence[float], how: How
) -> Edit:
    """Follows section 3.3: the image, turned by each share towards what ``after`` says beyond ``before``."""
    sampling = unclip.manipulation_sampling(dict(how.options))
    check_captions([before, after])
    with watched("text difference", unclip, sampling, how.watch, inversions=1) as progress:
        inversion = unclip.invert([image], None, progress, **how.options)
        made = unclip.text_difference(inversion, before, after, shares, how.seed, progress, **how.options)
    return _edit(_images(made), [f"turned by {share:.3g}" for share in shares], sampling)


def reconstruction(unclip: UnCLIP, image: Image.Image, caption: str | None, how: How) -> Edit:
    """Follows section 3: the image, and what its two latents become; how near it is, at every size that is made."""
    sampling = unclip.manipulation_sampling(dict(how.options))
    with watched("reconstruction", unclip, sampling, how.watch, inversions=1) as progress:
        inversion = unclip.invert([image], _listed(caption), progress, **how.options)
        made = unclip.reconstruct(inversion, how.seed, progress, **how.options)
    near = [f"{_psnr(made.images[side], image):.1f} dB at {side} px" for side in made.images]
    names = ("the image", f"its reconstruction, PSNR {', '.join(near)}")
    return _edit([_like(image, made), *_images(made)], names, sampling)


def components(unclip: UnCLIP, image: Image.Image, counts: Sequence[int] | None, how: How) -> Edit:
    """Follows section 4, figure 7: embeddings of the first principal components, the whole embedding, the image.

    All are drawn from one noise. ``counts`` None takes the paper's, in proportion to the components there are.
    """
    sampling = unclip.manipulation_sampling(dict(how.options))
    codes = unclip.codec.codes if unclip.codec else PAPER_CODES
    counts = counts or sorted({max(1, round(n * codes / PAPER_CODES)) for n in PAPER_COUNTS})
    embedding = unclip.embed([image])
    with watched("components", unclip, sampling, how.watch, decodings=2) as progress:
        made = unclip.principal_components(embedding, counts, how.seed, progress, **how.options)
        whole = unclip.decode(embedding, None, [how.seed], sampling, progress)
    near = cosine_similarity(made.embedding, embedding)
    names = [f"{n} of {codes} components, cosine {c:.3f}" for n, c in zip(counts, near.tolist(), strict=True)]
    images = [*_images(made), *_images(whole), _like(image, made)]
    return _edit(images, [*names, "the whole embedding", "the image"], sampling)


def priors(unclip: UnCLIP, caption: str, image: Image.Image | None, how: How) -> Edit:
    """Follows section 5.1, figure 8: a caption decoded from each prior's embedding, its text's and the image's."""
    sampling = unclip.sampling_with(dict(how.options))
    drawn = sum(prior_steps(unclip, dataclasses.asdict(sampling), option) for _, option in priors_of(unclip))
    with watched("priors", unclip, sampling, how.watch, more=drawn) as progress:
        compared = compare_priors(unclip, caption, how.seed, image, progress, **how.options)
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
def watched(
    name: str,
    unclip: UnCLIP,
    sampling: SamplingConfig,
    watch: Watch,
    *,
    inversions: int = 0,
    decodings: int = 1,
    more: int = 0,
) -> Iterator[reverse.Progress]:
    """Yields what shows progress as ``watch`` says, over all steps of ``inversions`` and ``decodings`` and ``more``."""
    if watch is not True:
        # Where images are made, an estimate of them follows.
        yield (lambda *step: watch(*step[:3])) if watch else reverse.ignore
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
    from torchmetrics.functional.image import peak_signal_noise_ratio  # takes seconds, for the reconstruction alone

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
