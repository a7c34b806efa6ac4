"""Changed pictures as strips: what each kind of ``unclip edit`` shows, with progress over all steps.

The mathematics is in models.cascade and models.comparison. Sections are those of Ramesh et al. 2022.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch.nn.functional import cosine_similarity

from models import reverse
from models.cascade import Generation, UnCLIP
from models.comparison import compare_priors, priors_of
from models.sampling_config import SamplingConfig
from models.tokens import check_captions
from models.view import view
from pipeline.progress import Progress
from pipeline.sampling.samples import decode_steps, prior_steps

PAPER_COUNTS, PAPER_CODES = (20, 30, 40, 80, 120, 160, 200, 320), 320  # figure 7
MOST_DB = 100.0
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Edit:
    """Pictures, uint8 [s, s, 3], what each of them is, and how they were sampled."""

    pictures: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    settings: Mapping[str, Any]


def variations(
    unclip: UnCLIP, picture: Image, count: int, eta: float, caption: str | None, seed: int, options: Options
) -> Edit:
    """Section 3.1: the picture, then ``count`` others of its embedding, with the seeds from ``seed`` on."""
    sampling, seeds = unclip.manipulation_sampling(dict(options)), range(seed, seed + count)
    with _watched("variations", unclip, sampling, inversions=1) as progress:
        inversion = unclip.invert([picture], _listed(caption), progress, **options)
        made = unclip.variations(inversion, seeds, eta, progress, **options)
    names = ("the picture", *(f"seed {s}" for s in seeds))
    return _edit([_like(picture, made), *_pictures(made)], names, sampling)


def interpolation(unclip: UnCLIP, first: Image, second: Image, count: int, seed: int, options: Options) -> Edit:
    """Section 3.2: ``count`` pictures from the first, reconstructed, to the second, reconstructed."""
    sampling = unclip.manipulation_sampling(dict(options))
    with _watched("interpolation", unclip, sampling, inversions=2) as progress:
        a, b = (unclip.invert([picture], None, progress, **options) for picture in (first, second))
        made = unclip.interpolate(a, b, count, seed, progress, **options)
    return _edit(_pictures(made), [f"{i / (count - 1):.0%}" for i in range(count)], sampling)


def text_difference(
    unclip: UnCLIP, picture: Image, before: str, after: str, most: float, count: int, seed: int, options: Options
) -> Edit:
    """Section 3.3: the picture, reconstructed, then turned further and further, up to the share ``most``."""
    sampling, shares = unclip.manipulation_sampling(dict(options)), [most * i / (count - 1) for i in range(count)]
    check_captions([before, after])
    with _watched("text difference", unclip, sampling, inversions=1) as progress:
        inversion = unclip.invert([picture], None, progress, **options)
        made = unclip.text_difference(inversion, before, after, shares, seed, progress, **options)
    return _edit(_pictures(made), [f"turned by {share:.3g}" for share in shares], sampling)


def reconstruction(unclip: UnCLIP, picture: Image, caption: str | None, seed: int, options: Options) -> Edit:
    """Section 3: the picture, and what its two latents become; how near it is, at every size that is made."""
    sampling = unclip.manipulation_sampling(dict(options))
    with _watched("reconstruction", unclip, sampling, inversions=1) as progress:
        inversion = unclip.invert([picture], _listed(caption), progress, **options)
        made = unclip.reconstruct(inversion, seed, progress, **options)
    near = [f"{_psnr(made.images[side], picture):.1f} dB at {side} px" for side in made.images]
    names = ("the picture", f"its reconstruction, PSNR {', '.join(near)}")
    return _edit([_like(picture, made), *_pictures(made)], names, sampling)


def components(unclip: UnCLIP, picture: Image, counts: Sequence[int] | None, seed: int, options: Options) -> Edit:
    """Section 4, figure 7: embeddings of the first so many principal components, the whole embedding, the picture.

    All are drawn from one noise. ``counts`` None takes the paper's, in proportion to the components there are.
    """
    sampling, codes = unclip.manipulation_sampling(dict(options)), unclip.codec.codes if unclip.codec else PAPER_CODES
    counts = counts or sorted({max(1, round(n * codes / PAPER_CODES)) for n in PAPER_COUNTS})
    embedding = unclip.embed([picture])
    with _watched("components", unclip, sampling, decodings=2) as progress:
        made = unclip.principal_components(embedding, counts, seed, progress, **options)
        whole = unclip.decode(embedding, None, [seed], sampling, progress)
    near = cosine_similarity(made.embedding, embedding)
    names = [f"{n} of {codes} components, cosine {c:.3f}" for n, c in zip(counts, near.tolist(), strict=True)]
    pictures = [*_pictures(made), *_pictures(whole), _like(picture, made)]
    return _edit(pictures, [*names, "the whole embedding", "the picture"], sampling)


def priors(unclip: UnCLIP, caption: str, picture: Image | None, seed: int, options: Options) -> Edit:
    """Section 5.1, figure 8: a caption decoded from each prior's embedding, its text embedding, and the picture's."""
    sampling = unclip.sampling_with(dict(options))
    drawn = sum(prior_steps(unclip, dataclasses.asdict(sampling), option) for _, option in priors_of(unclip))
    with _watched("priors", unclip, sampling, more=drawn) as progress:
        compared = compare_priors(unclip, caption, seed, picture, progress, **options)
    made = compared.generation
    near = {"caption": cosine_similarity(made.embedding, compared.text).tolist()}
    if picture is not None:  # its embedding is the last
        near["picture"] = cosine_similarity(made.embedding, made.embedding[-1:]).tolist()
    names = [
        f"{name}, cosine {', '.join(f'{values[i]:.3f} to the {what}' for what, values in near.items())}"
        for i, name in enumerate(compared.names)
    ]
    return _edit(_pictures(made), names, sampling)


@contextmanager
def _watched(
    name: str, unclip: UnCLIP, sampling: SamplingConfig, inversions: int = 0, decodings: int = 1, more: int = 0
) -> Iterator[reverse.Progress]:
    """Shows progress over so many inversions and decodings, and ``more`` steps."""
    steps = inversions * sampling.decoder_steps + decodings * decode_steps(unclip, dataclasses.asdict(sampling)) + more
    with Progress(name, steps, "steps") as line:
        yield lambda stage, *_: line.advance(1, stage)


def _edit(pictures: Sequence[np.ndarray], names: Sequence[str], sampling: SamplingConfig) -> Edit:
    return Edit(tuple(pictures), tuple(names), dataclasses.asdict(sampling))


def _listed(caption: str | None) -> list[str] | None:
    return None if caption is None else [caption]


def _pictures(made: Generation) -> list[np.ndarray]:
    return list(made.image.numpy())


def _like(picture: Image, made: Generation) -> np.ndarray:
    """The picture at the side of what was made."""
    return view(picture, max(made.images))


def _psnr(made: torch.Tensor, picture: Image) -> float:
    """Returns the PSNR in dB of one image, uint8 [1, s, s, 3], at most MOST_DB."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # takes seconds, for the reconstruction alone

    truth = torch.tensor(view(picture, made.shape[1]))[None]
    return min(MOST_DB, float(peak_signal_noise_ratio(made.float(), truth.float(), 255.0)))
