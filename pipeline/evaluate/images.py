"""Measures the decoder: lines (a), (d) and (f), all on images of 64 px."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.cascade import UnCLIP
from models.clip import Clip
from models.decoder import Decoder, decoder_loss
from models.draw import derive_seed
from models.view import view
from pipeline.evaluate import metrics
from pipeline.evaluate.captions import Phrases
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.gap import gap_figure, rise
from pipeline.evaluate.paired import paired
from pipeline.evaluate.rows import HeldOut, Tick
from pipeline.held_out import FEWEST
from pipeline.progress import counted

DRAWS = 4  # timesteps a row
IMAGES = 16  # drawn at once
CORNER = 4  # pixels: the margin of a 64 px emoji, and the side of each corner that is looked at


def decoder_gap(model: Decoder, rows: HeldOut, seed: int) -> Figure:
    """Returns line (a) of the decoder, whose condition is embedding and caption together."""
    conditions = ("image_embedding", "tokens")
    found = rise(lambda b, d: decoder_loss(model, b, d).total, rows.batch, conditions, rows.other, seed, DRAWS)
    return gap_figure("decoder", "embedding and caption", rows, found)


def draw_images(unclip: UnCLIP, rows: HeldOut, embeddings: Tensor | None, prior: str, seed: int, tick: Tick) -> Tensor:
    """Draws an image of 64 px a row, uint8 [n, 64, 64, 3], as the bundle samples.

    It is drawn of ``embeddings`` [n, d] and the caption or, for None, of the caption alone through ``prior``, "ar" or
    "diffusion".
    """
    sampling = unclip.sampling_with({"prior": prior, "size": 64})
    seeds = [derive_seed(seed, "image", i) for i in range(len(rows))]
    images = []
    for start in range(0, len(rows), IMAGES):
        part = slice(start, start + IMAGES)
        tokens, text = rows.batch["tokens"][part], rows.batch["text_embedding"][part]
        given = unclip.draw_embedding(tokens, text, seeds[part], sampling) if embeddings is None else embeddings[part]
        images.append(unclip.decode(given, tokens, seeds[part], sampling).image)
        tick(f"{min(start + IMAGES, len(rows))} of {len(rows)} images")
    return torch.cat(images)


def embed(clip: Clip, images: Tensor) -> Tensor:
    """Returns CLIP's embeddings of images uint8 [n, s, s, 3], by way of the view: fp32 [n, d] on the CPU."""
    views = [view(Image.fromarray(image.numpy()), clip.image_size) for image in images]
    pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).to(clip.mean.device)
    return torch.cat([clip.encode_image(part) for part in pixels.split(IMAGES)]).cpu()


def backgrounds(images: Tensor, palette: Mapping[str, Sequence[int]]) -> list[str]:
    """Returns the name of the colour of ``palette`` that is nearest to the mean of each image's corners.

    Images are uint8 [n, s, s, 3].
    """
    ends = torch.cat([torch.arange(CORNER), torch.arange(-CORNER, 0)])
    colours = images[:, ends][:, :, ends].double().mean((1, 2))
    known = torch.tensor(list(palette.values()), dtype=torch.float64)
    return [list(palette)[i] for i in torch.cdist(colours, known).argmin(1).tolist()]


def background_figure(model: str, source: str, images: Tensor, rows: HeldOut, phrases: Phrases, seed: int) -> Figure:
    """Returns line (d): how often the background is the one that the caption names, against every other row's caption.

    Only rows whose captions name one count; with fewer than FEWEST, or of one background, there is nothing to measure.
    """
    says = f"right background from {source}, above the share of shuffled captions"
    named = [phrases.background(caption) for caption in rows.captions]
    chosen = [i for i, name in enumerate(named) if name]
    why = ""
    if len(chosen) < FEWEST:
        why = f"{counted(len(chosen), 'caption')} of {len(rows)} {rows.split} rows name a background; it takes {FEWEST}"
    elif len({named[i] for i in chosen}) < 2:
        why = f"all captions of {rows.split} rows that name a background name the same one"
    if why:
        return Figure("d", model, "background", f"{model}: {says}", note=why, split=rows.split)
    seen = backgrounds(images[chosen], phrases.backgrounds)
    right = torch.tensor([[found == named[j] for j in chosen] for found in seen], dtype=torch.float64)
    hits = right.diagonal()
    chance = (right.sum(1) - hits) / (len(chosen) - 1)
    return paired("d", model, "background", says, hits, chance, rows, seed, "above", torch.tensor(chosen))


def ranking_figures(clip: Clip, rows: HeldOut, drawn: Tensor, early: Tensor | str, seed: int) -> list[Figure]:
    """Returns line (f): two similarities by CLIP, each of which must rank real > trained > early > shuffled captions.

    ``drawn`` are the decoder's images, uint8 [n, 64, 64, 3]; ``early`` those of an earlier checkpoint of it, or why
    there are none, and then trained stands directly above shuffled. Shuffled are the decoder's images beside another
    row's caption or image.
    """
    real = rows.batch["image"].permute(0, 2, 3, 1).cpu()
    embeddings = {"real": embed(clip, real), "trained": embed(clip, drawn)}
    if isinstance(early, Tensor):
        embeddings["early"] = embed(clip, early)
    figures = []
    targets = {
        "caption": rows.batch["text_embedding"].cpu(),
        "image": embeddings["real"],
    }
    for name, target in targets.items():
        scores = {kind: metrics.cosine(x, target) for kind, x in embeddings.items()}
        scores["shuffled"] = metrics.cosine(embeddings["trained"], target[rows.other.cpu()])
        for upper, lower in pairwise(scores):
            says = f"CLIP similarity to the {name}, {upper} above {lower}"
            values = scores[upper], scores[lower]
            figures.append(paired("f", "decoder", f"{name}_{upper}_{lower}", says, *values, rows, seed, "above"))
        if isinstance(early, str):
            says = f"decoder: CLIP similarity to the {name}, trained above an early checkpoint"
            figures.append(Figure("f", "decoder", f"{name}_early", says, note=early, split=rows.split))
    return figures


def beside(*lines: Tensor) -> Tensor:
    """Returns lines of images, uint8 [n, s, s, 3] each, as one image uint8 [3, h, w], a line below the other."""
    return torch.cat([torch.cat(list(line), dim=1) for line in lines]).permute(2, 0, 1)
