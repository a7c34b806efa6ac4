"""What trains a CLIP: views of its images, and the contrastive loss over the rows of all workers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip import Clip
from models.draw import Draw
from models.losses import Losses

Gather = Callable[[Tensor], tuple[Tensor, int]]
"""Rows of this worker to the rows of all workers, and the place among them where its own begin; gradients flow back."""


def alone(rows: Tensor) -> tuple[Tensor, int]:
    """Returns the Gather of a worker that holds the whole batch."""
    return rows, 0


def clip_loss(clip: Clip, batch: dict[str, Tensor], draw: Draw, gather: Gather = alone, crop: float = 0.75) -> Losses:
    """Returns the symmetric contrastive loss of each row against the whole batch, nats, [b] (CLIP, figure 3).

    ``batch`` has "image" uint8 [b, 3, image_size, image_size], augmented here, and "tokens" int64 [b, 77]. Other
    workers' rows come through ``gather``, and a worker's own must not be cut. The temperature stops at 1/100.
    """
    image = clip.encode_pixels(augment(batch["image"], draw, crop))
    text = clip.encode_text(batch["tokens"])
    with torch.autocast(image.device.type, enabled=False):
        images, start = gather(image)
        texts, _ = gather(text)
        scale = clip.model.logit_scale.exp().clamp(max=100)
        labels = torch.arange(start, start + len(image), device=image.device)
        image_to_text = F.cross_entropy(scale * image @ texts.T, labels, reduction="none")
        text_to_image = F.cross_entropy(scale * text @ images.T, labels, reduction="none")
    parts = {"image_to_text": image_to_text, "text_to_image": text_to_image}
    return Losses((image_to_text + text_to_image) / 2, parts)


def augment(images: Tensor, draw: Draw, crop: float = 0.75) -> Tensor:
    """Returns training images fp32 [b, 3, s, s] in [0, 1] from uint8 ones.

    A square crop of ``crop`` to 1 of the side at a random place, resized back. No flips: left and right are words.
    """
    if crop == 1:
        return images / 255
    side = crop + (1 - crop) * draw.uniform("crop_side", 1)
    centre = (2 * draw.uniform("crop_place", 2) - 1) * (1 - side)  # the image being [-1, 1]
    scale = torch.diag_embed(side.expand(-1, 2))
    with torch.autocast(images.device.type, enabled=False):  # a place in bf16 is up to half a pixel off
        grid = F.affine_grid(torch.cat([scale, centre[..., None]], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images / 255, grid, padding_mode="border", align_corners=False).clamp(0, 1)
