"""The decoder: a 64 px diffusion model conditioned on a CLIP image embedding and, optionally, a caption.

Ramesh et al. 2022 (unCLIP), section 2.1, on GLIDE's architecture (Nichol et al. 2021).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.guidance import guidance_rows, guided_output
from models.diffusion.process import Prediction, hybrid_loss, predict, q_sample
from models.diffusion.samplers import Denoise
from models.diffusion.schedules import make_schedule
from models.frozen_text import FrozenText, required
from models.image_configs import DecoderConfig
from models.losses import Losses
from models.nn.pixel_correction import PixelCorrection
from models.nn.text_encoder import ClipTextEncoder, TextEncoder
from models.nn.unet import UNet, zeroed
from models.pixels import from_uint8
from models.prior_configs import TextTower
from models.random_streams import RandomStreams

CLIP_CONTEXT = 77
"""The length of the captions that CLIP's tokenizer makes."""


class Condition(NamedTuple):
    """Holds the condition of the U-Net.

    Attributes:
        added: Vector added to the timestep embedding, [b, embedding_width].
        context: Tokens to attend to, [b, n, context_width].
        shown: Mask bool [b, n]; False hides a token, None shows all.
        layout: Features added at the lowest resolution, [b, width, h, w].
    """

    added: Tensor
    context: Tensor
    shown: Tensor | None = None
    layout: Tensor | None = None

    def first(self, rows: int) -> "Condition":
        """Returns the condition of the first rows."""
        return Condition(*(None if part is None else part[:rows] for part in self))  # type: ignore[arg-type]


class Whitening(nn.Module):
    """Centres image embeddings [b, d] and brings their directions to nearly one variance; the identity until ``fit``.

    A CLIP of few images spreads them over few directions: of the demo's, 17 of 512 hold 99% of the variance. The others
    would be learnt late, as gradients of small inputs are small.
    """

    FLOOR = 0.0025  # share of the mean variance; directions with less are noise, and stay small
    mean: Tensor
    matrix: Tensor

    def __init__(self, embed_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("matrix", torch.eye(embed_dim))

    def fit(self, embeddings: Tensor) -> None:
        """Measures mean and covariance of [n, d]. The matrix is symmetric, so no choice of eigenvectors is in it."""
        z = embeddings.double()
        variances, directions = torch.linalg.eigh(torch.cov(z.T, correction=0))
        # Equal embeddings have no variance at all: the clamp keeps their scale finite.
        scales = (variances + self.FLOOR * variances.mean()).clamp(min=1e-12).rsqrt()
        self.mean.copy_(z.mean(0))
        self.matrix.copy_((directions * scales) @ directions.T)

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return (z.float() - self.mean) @ self.matrix


class Layout(nn.Module):
    """Projects an image embedding [b, d] to features [b, width, side, side], which start at zero.

    Context tokens and the timestep embedding condition all positions alike; this says what is where. ``words_width`` is
    the width of the caption's words, which are projected with it, since attention learns late where things go; 0 turns
    them off.
    """

    def __init__(self, embed_dim: int, channels: int, side: int, width: int, words_width: int = 0):
        super().__init__()
        self.positions = nn.Linear(embed_dim, channels * side * side)
        self.words = nn.Linear(words_width, channels * side * side, bias=False) if words_width else None
        self.shape = (channels, side, side)
        self.out = zeroed(nn.Conv2d(channels, width, 1))

    def forward(self, z: Tensor, words: Tensor | None = None) -> Tensor:
        """Returns the features; ``words`` [b, words_width] are zeros where a caption is dropped."""
        features = self.positions(z)
        if self.words is not None:
            features = features + self.words(words)
        return self.out(F.silu(features.unflatten(1, self.shape)))


class Decoder(nn.Module):
    """Predicts noise (or v) and variance of a noised image.

    The image embedding z has unit norm, as CLIP gives it, and is multiplied by ``scale``, by default sqrt(d) for unit
    variance, or whitened. W z joins the timestep embedding, and W' z makes ``clip_tokens`` tokens before the outputs of
    the decoder's own text encoder, whose vector for the caption joins the timestep embedding as well (GLIDE); with
    ``text_encoder: frozen`` it is a copy of CLIP's, of the sizes ``text_tower``. Dropout uses PyTorch's global
    generator.
    """

    def __init__(self, config: DecoderConfig, embed_dim: int, text_tower: TextTower | None = None):
        super().__init__()
        self.config = config
        self.embed_dim = embed_dim
        self.text_tower = text_tower
        self.scale = config.embedding_norm or embed_dim**0.5
        self.whitening = Whitening(embed_dim) if config.whiten else None
        sides = config.feature_sides()
        clip = config.text_encoder != "glide"
        context_width = config.context_width or config.text_width
        self.unet = UNet(
            in_channels=3 * config.patch**2,
            out_channels=6 * config.patch**2,
            channels=config.channels,
            depth=config.depth,
            multipliers=config.multipliers,
            dropout=config.dropout,
            attention_levels=frozenset(sides.index(side) for side in config.attention_resolutions),
            head_channels=config.head_channels,
            context_width=context_width,
        )
        context = min(CLIP_CONTEXT, config.text_context)
        shape = (config.vocabulary, context, config.text_width, config.text_depth, config.text_heads)
        self.text: ClipTextEncoder | TextEncoder
        text_width = config.text_width
        if config.text_encoder == "frozen":
            tower = required(text_tower)
            self.text, text_width = FrozenText(tower, embed_dim, context), tower.width
        else:
            self.text = ClipTextEncoder(*shape, embed_dim) if clip else TextEncoder(*shape)
        self.text_to_time = nn.Linear(embed_dim if clip else config.text_width, self.unet.embedding_width)
        self.image_to_time = nn.Linear(embed_dim, self.unet.embedding_width)
        self.image_to_tokens = nn.Linear(embed_dim, config.clip_tokens * context_width)
        self.text_to_context = (
            nn.Sequential(nn.Linear(text_width, context_width), nn.LayerNorm(context_width)) if clip else nn.Identity()
        )
        self.null_image = nn.Parameter(torch.zeros(embed_dim), requires_grad=config.null_image == "learned")
        self.layout = None
        if config.layout_channels:
            words_width = required(text_tower).width if config.text_encoder == "frozen" else 0
            lowest = config.channels * config.multipliers[-1]
            self.layout = Layout(embed_dim, config.layout_channels, sides[-1], lowest, words_width)
        self.pixels = (
            PixelCorrection(3, config.pixel_channels, 6, self.unet.embedding_width) if config.pixel_channels else None
        )

    def condition(self, image_embedding: Tensor, tokens: Tensor, keep_image: Tensor, keep_text: Tensor) -> Condition:
        """Encodes embeddings [b, d] and BPE tokens [b, 77], 0 after the end token; ``keep_...`` bool [b], False drops.

        It does not depend on the timestep, so a sampler calls it once.
        """
        if self.config.drop_image == 1:  # a condition that training always dropped has untrained weights
            keep_image = torch.zeros_like(keep_image)
        if self.config.drop_text == 1:
            keep_text = torch.zeros_like(keep_text)
        z = image_embedding * self.scale if self.whitening is None else self.whitening(image_embedding)
        z = torch.where(keep_image[:, None], z, self.null_image)
        text = self.text(tokens, keep_text)
        clip_tokens = self.image_to_tokens(z).unflatten(1, (self.config.clip_tokens, -1))
        shown = None if text.shown is None else F.pad(text.shown, (self.config.clip_tokens, 0), value=True)
        layout = None
        if self.layout is not None:
            words = self.text.words(tokens) * keep_text[:, None] if isinstance(self.text, FrozenText) else None
            layout = self.layout(z, words)
        return Condition(
            self.image_to_time(z) + self.text_to_time(text.pooled),
            torch.cat([clip_tokens, self.text_to_context(text.states)], dim=1),
            shown,
            layout,
        )

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Returns prediction and variance interpolation (-1 to 1), fp32 [b, 6, s, s], at timesteps [b]."""
        patches = F.pixel_unshuffle(x_t, self.config.patch)
        output = F.pixel_shuffle(self.unet(patches, t, *condition), self.config.patch)
        return output if self.pixels is None else self.pixels(output, x_t, self.unet.timestep(t))

    def forward(
        self, x_t: Tensor, t: Tensor, image_embedding: Tensor, tokens: Tensor, keep_image: Tensor, keep_text: Tensor
    ) -> Tensor:
        """Returns ``predict`` under ``condition``; shapes as there."""
        return self.predict(x_t, t, self.condition(image_embedding, tokens, keep_image, keep_text))


def decoder_loss(model: Decoder, batch: dict[str, Tensor], rng: RandomStreams) -> Losses:
    """Returns the hybrid loss of "image" (uint8 [b, 3, s, s]), given "image_embedding" [b, d] and "tokens" [b, 77].

    Embedding and caption are dropped independently of each other, in training mode only: validation measures the
    model with its conditions. Parts: "mse" and "vb".
    """
    config = model.config
    schedule = make_schedule(config.schedule, config.steps)
    x0 = from_uint8(batch["image"])
    t = rng.integers("t", config.steps)
    noise = rng.normal("noise", *x0.shape[1:])
    keep_image = rng.keep("drop_image", config.drop_image if model.training else 0.0)
    keep_text = rng.keep("drop_text", config.drop_text if model.training else 0.0)
    x_t = q_sample(x0, noise, schedule.at(t))
    output = model(x_t, t, batch["image_embedding"], batch["tokens"], keep_image, keep_text)
    mse, vb = hybrid_loss(config.prediction, output, x0, noise, t, schedule, config.max_snr)
    return Losses(mse + vb, {"mse": mse, "vb": vb})


def decoder_denoise(
    model: Decoder,
    image_embedding: Tensor,
    tokens: Tensor | None,
    guidance: float,
    interval: tuple[float, float] = (0.0, 1.0),
    threshold: float = 0.0,
) -> Denoise:
    """Returns the denoiser for embeddings [b, d] and captions [b, 77] or None; ``guidance`` is w, 0 for none.

    The empty condition drops both. x0 is clipped to [-1, 1]; ``threshold`` is ``predict``'s. Outside of ``interval``,
    shares of the timesteps, nothing is guided (Kynkäänniemi et al. 2024), and a step costs half. All rows are at one
    timestep.
    """
    schedule = make_schedule(model.config.schedule, model.config.steps)
    rows = len(image_embedding)
    keep = guidance_rows(rows, guidance, image_embedding.device)
    branches = len(keep) // rows  # 2 with guidance, whose conditional and empty rows are one batch
    keep_text = keep if tokens is not None else torch.zeros_like(keep)
    if tokens is None:
        tokens = torch.zeros(rows, CLIP_CONTEXT, dtype=torch.int64, device=keep.device)
    with torch.no_grad():
        condition = model.condition(image_embedding.repeat(branches, 1), tokens.repeat(branches, 1), keep, keep_text)
    alone = condition.first(rows)  # the conditional branch, outside of the interval
    first, last = (share * model.config.steps for share in interval)
    always = interval == (0.0, 1.0)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        # Reading t stops a GPU for a moment, so it is read only where the interval asks for it.
        guided = guidance != 0 and (always or first <= float(t[0]) <= last)
        given, weight = (condition, guidance) if guided else (alone, 0.0)
        output = guided_output(lambda x, times: model.predict(x, times, given), x_t, t, weight)
        return predict(model.config.prediction, output, x_t, schedule.at(t), clip=1.0, threshold=threshold)

    return denoise
