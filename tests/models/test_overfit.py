"""Each of the five models learns eight real pairs by heart, until sampling gives them back."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.ar_prior import ARPrior, ar_prior_loss
from models.ar_prior import sample as sample_codes
from models.codec_fit import fit_codec
from models.decoder import Decoder, decoder_denoise, decoder_loss
from models.diffusion.samplers import ddim
from models.diffusion.schedules import make_schedule, strided_grid
from models.diffusion_prior import DiffusionPrior, diffusion_prior_denoise, diffusion_prior_loss
from models.losses import Losses
from models.pixels import from_uint8, psnr, resize
from models.prior_configs import TextTower
from models.random_streams import RandomStreams
from models.tokens import tokenize
from models.upsampler import Upsampler, sampling_low, upsampler_denoise, upsampler_loss
from pipeline.config import preset_config
from pipeline.data.source.drawings.listing import drawing_rows
from pipeline.data.source.drawings.world import draw, drawing_of

pytestmark = pytest.mark.slow
ROWS, DIM = 8, 64
TOWER = TextTower.of(preset_config("nano").clip.model.model_config())  # of random weights


def images(side: int) -> tuple[Tensor, list[str]]:
    """Eight drawings, uint8 [8, 3, side, side], and their captions."""
    rows = drawing_rows("nano")[:ROWS]
    drawn = [draw(drawing_of(row.url)[0], 1024 if side > 256 else 256) for row in rows]
    arrays = [np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)) for picture in drawn]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2), [row.captions[0] for row in rows]


def pairs(side: int = 64) -> dict[str, Tensor]:
    """A batch as the losses take it, with random embeddings of which text and image are alike."""
    image, captions = images(side)
    g = torch.Generator().manual_seed(0)
    embedding = F.normalize(torch.randn(ROWS, DIM, generator=g), dim=1)
    text = F.normalize(embedding + 0.05 * torch.randn(ROWS, DIM, generator=g), dim=1)
    return {"image": image, "tokens": tokenize(captions), "image_embedding": embedding, "text_embedding": text}


def overfit(
    model: nn.Module, loss: Callable[[dict[str, Tensor], RandomStreams], Losses], batch: dict[str, Tensor], steps: int,
    rate: float, repeats: int = 1,
) -> None:  # fmt: skip
    """Adam with a rate that falls to nothing, on ``repeats`` copies of the batch a step, each with noise of its own."""
    many = {name: column.repeat(repeats, *[1] * (column.ndim - 1)) for name, column in batch.items()}
    optimiser = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, step / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        total = loss(many, RandomStreams([(step, ROWS * repeats)])).total.mean()
        optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.eval()


def test_the_ar_prior_reproduces_eight_embeddings() -> None:
    torch.manual_seed(0)
    batch = pairs()
    rows = F.normalize(torch.randn(4096, DIM, dtype=torch.float64), dim=1)
    codec = fit_codec(rows, (rows * rows.roll(1, 0)).sum(1), DIM).codec
    exact = replace(preset_config("nano").ar_prior.model, smooth_buckets=0)  # smooth logits know no single bucket
    model = ARPrior(exact, DIM, codec.codes, TOWER)
    overfit(model, lambda rows, draw: ar_prior_loss(model, rows, draw, codec), batch, 600, 3e-3)
    dots = codec.encode_dot((batch["image_embedding"] * batch["text_embedding"]).sum(-1))
    codes = sample_codes(model, batch["tokens"], batch["text_embedding"], dots, RandomStreams([(1, ROWS)]))
    assert torch.equal(codes, codec.encode(batch["image_embedding"]))


def test_the_diffusion_prior_reproduces_eight_embeddings() -> None:
    torch.manual_seed(0)
    batch = pairs()
    model = DiffusionPrior(preset_config("nano").diffusion_prior.model, DIM, TOWER)
    overfit(model, lambda rows, draw: diffusion_prior_loss(model, rows, draw), batch, 600, 2e-3, repeats=8)
    denoise = diffusion_prior_denoise(model, batch["tokens"], batch["text_embedding"])
    noise, schedule = RandomStreams([(1, ROWS)]).normal("x_T", DIM), make_schedule("cosine", 1000)
    samples = model.image_embedding(ddim(denoise, noise, strided_grid(1000, 50), schedule))
    assert (samples * batch["image_embedding"]).sum(-1).min() > 0.99


def test_the_decoder_reproduces_eight_images() -> None:
    torch.manual_seed(0)
    batch = pairs()
    model = Decoder(preset_config("nano").decoder.model, DIM, TOWER)
    overfit(model, lambda rows, draw: decoder_loss(model, rows, draw), batch, 2000, 3e-3, repeats=2)
    denoise = decoder_denoise(model, batch["image_embedding"], batch["tokens"], guidance=0.0)
    noise, schedule = RandomStreams([(1, ROWS)]).normal("x_T", 3, 64, 64), make_schedule("cosine", 1000)
    samples = ddim(denoise, noise, strided_grid(1000, 50), schedule).clamp(-1, 1)
    found = psnr(samples, from_uint8(batch["image"]))
    assert found.min() > 25


# The second one in miniature, a sixteenth of its side: at full size two cores would learn for hours. Its corruption,
# which is never the same twice, and its schedule are its own.
@pytest.mark.parametrize(
    ("name", "smaller", "repeats"),
    [("upsampler_256", {}, 1), ("upsampler_1024", {"low_size": 16, "image_size": 64, "crop": 1.0}, 2)],
)
def test_an_upsampler_reproduces_eight_images(name: str, smaller: dict[str, Any], repeats: int) -> None:
    torch.manual_seed(0)
    config = replace(getattr(preset_config("nano"), name).model, **smaller)
    image = images(config.image_size)[0]
    model = Upsampler(config)
    overfit(model, lambda rows, draw: upsampler_loss(model, rows, draw), {"image": image}, 1000, 3e-3, repeats)
    small = RandomStreams([(1, ROWS)])
    low = sampling_low(config, resize(from_uint8(image), (config.low_size, config.low_size)), small)
    noise = small.normal("x_T", 3, config.image_size, config.image_size)
    grid, schedule = strided_grid(1000, 15), make_schedule(config.schedule, 1000)
    truth = from_uint8(image)
    found = psnr(ddim(upsampler_denoise(model, low), noise, grid, schedule).clamp(-1, 1), truth)
    bicubic = psnr(resize(low, (config.image_size, config.image_size)), truth)
    assert found.min() > 25
    assert (found - bicubic).mean() > 3
    assert found.min() > bicubic.min() + 2  # the most detailed image
