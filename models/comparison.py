"""The gain of a prior: one caption decoded from several embeddings (Ramesh et al. 2022, section 5.1, figure 8)."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from models.cascade import Generation, UnCLIP
from models.reverse import Progress, silent
from models.tokens import check_captions, tokenize

AR, DIFFUSION, TEXT, IMAGE = "AR prior", "diffusion prior", "text embedding", "true image embedding"


@dataclass(frozen=True)
class Comparison:
    """Holds images of one caption, the i-th decoded from the embedding called ``names[i]``.

    ``text`` is the caption's own embedding, unit norm, fp32 [1, d].
    """

    names: tuple[str, ...]
    generation: Generation
    text: Tensor


def priors_of(unclip: UnCLIP) -> list[tuple[str, str]]:
    """Returns the name and sampling option of each prior that a bundle has."""
    both = ((AR, "ar", unclip.ar_prior), (DIFFUSION, "diffusion", unclip.diffusion_prior))
    return [(name, option) for name, option, model in both if model is not None]


@torch.no_grad()
def compare_priors(
    unclip: UnCLIP,
    caption: str,
    seed: int = 0,
    image: Image.Image | None = None,
    progress: Progress = silent,
    **options: object,
) -> Comparison:
    """Decodes a caption from each prior's embedding, from its text embedding in place of one, and from ``image``'s.

    The decoder always sees the caption, is guided as when sampling, and starts from the same noise. Raises ValueError
    on a caption that is too long and an option out of range.
    """
    sampling = unclip.sampling_with(options)
    check_captions([caption])
    device = unclip.clip.mean.device
    tokens = tokenize([caption]).to(device)
    text = unclip.clip.encode_text(unclip.clip.tokenize([caption]).to(device))
    embeddings = {
        name: unclip.draw_embedding(tokens, text, [seed], unclip.sampling_with(options | {"prior": option}), progress)
        for name, option in priors_of(unclip)
    }
    embeddings[TEXT] = text
    if image is not None:
        embeddings[IMAGE] = unclip.embed([image])
    many = list(embeddings.values())
    made = unclip.decode(torch.cat(many), tokens.expand(len(many), -1), [seed] * len(many), sampling, progress)
    return Comparison(tuple(embeddings), made, text)
