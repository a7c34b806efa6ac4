"""The training of a CLIP: augmented views, and the contrastive loss over the rows of all workers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.clip import Clip
from models.losses import Losses
from models.random_streams import RandomStreams

Gather = Callable[[Tensor], tuple[Tensor, int]]
"""Rows of this worker to the rows of all workers, and the place among them where its own begin; gradients flow back."""


def alone(rows: Tensor) -> tuple[Tensor, int]:
    """Returns the Gather of a worker that holds the whole batch."""
    return rows, 0


def clip_loss(
    clip: Clip,
    batch: dict[str, Tensor],
    rng: RandomStreams,
    gather: Gather = alone,
    crop: float = 0.75,
    at_once: int = 0,
) -> Losses:
    """Returns the symmetric contrastive loss of each row against the whole batch, nats, [b] (CLIP, figure 3).

    ``batch`` has "image" uint8 [b, 3, image_size, image_size], augmented here, and "tokens" int64 [b, 77]. Other
    workers' rows come through ``gather``, and a worker's own must not be cut. The temperature stops at 1/100. Where
    ``at_once`` is not 0, that many rows are encoded at once, and again in the backward pass.
    """
    image, text = _encoded(clip, batch, random_crops(rng, crop), at_once or len(batch["image"]))
    with torch.autocast(image.device.type, enabled=False):  # near logits of 100 bf16 has steps of 0.5
        images, start = gather(image)
        texts, _ = gather(text)
        scale = clip.model.logit_scale.exp().clamp(max=100)
        labels = torch.arange(start, start + len(image), device=image.device)
        image_to_text = F.cross_entropy(scale * image @ texts.T, labels, reduction="none")
        text_to_image = F.cross_entropy(scale * text @ images.T, labels, reduction="none")
    parts = {"image_to_text": image_to_text, "text_to_image": text_to_image}
    return Losses((image_to_text + text_to_image) / 2, parts)


def _encoded(clip: Clip, batch: dict[str, Tensor], crops: Tensor | None, at_once: int) -> tuple[Tensor, Tensor]:
    """Returns the embeddings of images and captions, fp32 [b, d] each.

    Where there are more than ``at_once`` rows, memory holds the activations of that many, and the backward pass encodes
    them again: gradients are those of the whole batch (GradCache, Gao et al. 2021).
    """

    def encode(images: Tensor, tokens: Tensor, crops: Tensor | None) -> tuple[Tensor, Tensor]:
        # Parts that shared autocast's bf16 copy of a weight would add up its gradients in bf16.
        torch.clear_autocast_cache()
        return clip.encode_pixels(cropped(images, crops)), clip.encode_text(tokens)

    images, tokens = batch["image"], batch["tokens"]
    if at_once >= len(images):
        return encode(images, tokens, crops)
    parts = []
    for start in range(0, len(images), at_once):
        rows = slice(start, start + at_once)
        # Of these tensors it learns the device whose autocast it has to restore.
        given = images[rows], tokens[rows], None if crops is None else crops[rows]
        parts.append(checkpoint(encode, *given, use_reentrant=False))
    encoded, said = zip(*parts, strict=True)
    return torch.cat(encoded), torch.cat(said)


def random_crops(rng: RandomStreams, least: float) -> Tensor | None:
    """Returns the maps from images, being [-1, 1], to their crops, fp32 [b, 2, 3]; None where nothing is cut off.

    A crop is a square of ``least`` to 1 of the side at a random place. No flips: left and right are words.
    """
    if least == 1:
        return None
    side = least + (1 - least) * rng.uniform("crop_side", 1)
    centre = (2 * rng.uniform("crop_place", 2) - 1) * (1 - side)
    return torch.cat([torch.diag_embed(side.expand(-1, 2)), centre[..., None]], dim=2)


def cropped(images: Tensor, crops: Tensor | None) -> Tensor:
    """Returns the crops of uint8 images, each resized to the whole image's size, fp32 in [0, 1]."""
    if crops is None:
        return images / 255
    with torch.autocast(images.device.type, enabled=False):  # a place in bf16 is up to half a pixel off
        grid = F.affine_grid(crops, list(images.shape), align_corners=False)
    return F.grid_sample(images / 255, grid, padding_mode="border", align_corners=False).clamp(0, 1)
