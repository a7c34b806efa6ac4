"""Draws images of 64 px of rows, and scores them by a second CLIP."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.cascade import UnCLIP
from models.clip import Clip
from models.random_streams import derive_seed
from models.view import view
from pipeline.errors import UserError
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.metric import DRAWERS, Metric
from pipeline.evaluate.priors import first_places
from pipeline.evaluate.rows import SplitRows, Tick
from pipeline.evaluate.statistics import ranks
from pipeline.evaluate.subject import Subject

BATCH = 16  # images that are drawn or embedded at once


def draw_images(unclip: UnCLIP, rows: SplitRows, prior: str | None, seed: int, tick: Tick) -> Tensor:
    """Draws an image of 64 px a row, uint8 [n, 64, 64, 3], as the bundle samples.

    It is drawn from the caption alone through ``prior``, "ar" or "diffusion", or, for None, from the caption and the
    image's own embedding.
    """
    sampling = unclip.sampling_with({"size": 64} | ({"prior": prior} if prior else {}))
    seeds = [derive_seed(seed, "image", i) for i in range(len(rows))]
    images = []
    for start in range(0, len(rows), BATCH):
        part = slice(start, start + BATCH)
        tokens, text = rows.batch["tokens"][part], rows.batch["text_embedding"][part]
        if prior is None:
            embedding = rows.batch["image_embedding"][part]
        else:
            embedding = unclip.draw_embedding(tokens, text, seeds[part], sampling)
        images.append(unclip.decode(embedding, tokens, seeds[part], sampling).image)
        tick(f"{min(start + BATCH, len(rows))} of {len(rows)} {rows.split} images")
    return torch.cat(images)


def image_grid(*lines: Tensor) -> Tensor:
    """Returns rows of images, uint8 [n, s, s, 3] each, as one image uint8 [3, h, w], a row below the other."""
    return torch.cat([torch.cat(list(line), dim=1) for line in lines]).permute(2, 0, 1)


def load_judge(weights: str | None, device: torch.device) -> Clip | None:
    """Returns the CLIP of ``evaluation.judge``, written as ``clip.weights`` is; None for none. Raises UserError."""
    # A second CLIP, since a model may fit the errors of the one whose embeddings it was trained on.
    if weights is None:
        return None
    try:
        clip = Clip.named(weights)
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"evaluation.judge: {e}") from e
    return clip.to(device)


def embed(clip: Clip, images: Tensor) -> Tensor:
    """Returns CLIP's embeddings of views of images uint8 [n, s, s, 3]: fp32 [n, d] on the CPU."""
    views = [view(Image.fromarray(image.numpy()), clip.image_size) for image in images]
    pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).to(clip.mean.device)
    return torch.cat([clip.encode_image(part) for part in pixels.split(BATCH)]).cpu()


def measure_judged(subject: Subject, judge: Clip, drawn: Tensor, rows: SplitRows) -> list[Figure]:
    """Returns how often a second CLIP retrieves the captions of ``rows`` from images ``drawn`` for them.

    A caption is found if it is among the first of all captions by the cosine. The baseline is the share by chance.
    ``drawn`` is uint8 [n, s, s, 3].
    """
    first = first_places(len(rows))
    tokens = judge.tokenize(rows.captions).to(judge.mean.device)
    texts = torch.cat([judge.encode_text(part).cpu() for part in tokens.split(BATCH)])
    found = (ranks(embed(judge, drawn), texts) <= first).double()
    return [subject.compare(rows, found, torch.full((len(rows),), first / len(rows)))]


JUDGED = Metric(
    "judged",
    "A second CLIP retrieves the caption of a generated image more often than chance",
    DRAWERS,
    ("judge", "drawn", "images"),
    measure_judged,
    together=True,
)
