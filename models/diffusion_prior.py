"""The diffusion prior: a caption to an image embedding by denoising.

unCLIP (Ramesh et al. 2022), section 2.2. One causal transformer reads

    77 caption tokens | text embedding | timestep | noised image embedding | query

and its output at the query is the clean embedding. Embeddings are diffused at ``scale`` times the square root of their
dimension (unCLIP, appendix C). Table 3's 24 layers of width 2,048 make the 1B of its model size alone, so its "text
encoder" row is this transformer, and captions enter as token embeddings, or with ``text_encoder: frozen`` as the token
states of CLIP (models/frozen_text.py).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.analytic import analytic_variance, fill_in, squared_noise
from models.diffusion.guidance import guidance_rows, guided_output
from models.diffusion.process import Prediction, mean_over_row, predict, q_sample
from models.diffusion.samplers import Denoise
from models.diffusion.schedules import make_schedule, strided_grid
from models.frozen_text import CaptionPrior, CaptionRegression, FrozenCaption, required
from models.losses import Losses
from models.nn.embedding import timestep_embedding
from models.nn.transformer import Cache, CaptionEmbedding, Transformer, normal_linear
from models.prior_configs import STEP_TOKENS, DiffusionPriorConfig, TextTower
from models.random_streams import RandomStreams

GAMMA_STEPS = 64
"""Timesteps at which Gamma is measured: the sampling steps of unCLIP's prior."""


class Condition(NamedTuple):
    """Holds the encoded captions of a batch.

    Attributes:
        cache: Keys and values of the transformer.
        line: Image embeddings by the regression, [b, d]; None without one.
    """

    cache: Cache
    line: Tensor | None


class DiffusionPrior(CaptionPrior):
    """Predicts scaled clean image embeddings of ``embed_dim`` from noised ones.

    ``gamma``, fp32 [steps], is Analytic-DPM's statistic of the finished model, and None until it is measured.
    """

    gamma: Tensor | None

    def __init__(self, config: DiffusionPriorConfig, embed_dim: int, text_tower: TextTower | None = None):
        super().__init__()
        self.config = config
        self.embed_dim = embed_dim
        self.text_tower = text_tower
        width = config.width
        if config.text_encoder == "frozen":
            self.caption = FrozenCaption(required(text_tower), embed_dim, config.text_context, width)
        else:
            self.caption = CaptionEmbedding(config.vocabulary, config.text_context, width)
        self.embedding_in = normal_linear(embed_dim, width)
        self.null_embedding = nn.Parameter(torch.empty(width))
        self.timestep = nn.Sequential(normal_linear(width, width), nn.SiLU(), normal_linear(width, width))
        self.noised_in = normal_linear(embed_dim, width)
        self.query = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(4, width))  # of the last four; the caption brings its own
        self.transformer = Transformer(width, config.depth, config.heads, causal=True)
        self.out = normal_linear(width, embed_dim)
        for vector in (self.null_embedding, self.query):
            nn.init.normal_(vector, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        self.line = CaptionRegression(required(text_tower).width, embed_dim) if config.ridge else None
        if config.ridge:  # the model begins as the regression
            nn.init.zeros_(self.out.weight)
        self.register_buffer("gamma", None)

    @property
    def scale(self) -> float:
        """Returns the length at which image embeddings are diffused."""
        return self.config.scale * self.embed_dim**0.5

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Makes room for ``gamma`` if the weights bring it."""
        # torch takes a buffer that is None for one that does not exist, and would refuse the weights.
        if f"{prefix}gamma" in state_dict:
            self.gamma = self.query.new_empty(self.config.steps, dtype=torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def condition(self, tokens: Tensor, text_embedding: Tensor, keep_text: Tensor) -> Condition:
        """Encodes captions; the arguments are those of ``forward``.

        They come first and the transformer is causal, so their keys and values depend on neither x_t nor t: a sampler
        calls this once, and a step computes three positions.
        """
        inputs, shown = self.caption_inputs(tokens, text_embedding, keep_text)
        cache = Cache(inputs.shape[1] + STEP_TOKENS)
        self.transformer(inputs, cache, shown)
        return Condition(cache, self.regress(tokens, text_embedding, keep_text))

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Returns ``forward`` for captions that ``condition`` has encoded."""
        out = self.transformer(self.step_inputs(x_t, t), condition.cache, last_only=True)
        condition.cache.length -= STEP_TOKENS  # so that the next step overwrites these positions
        return self.embedding_out(out, condition.line)

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor, text_embedding: Tensor, keep_text: Tensor) -> Tensor:
        """Returns the clean embedding at the diffusion's scale, fp32 [b, d].

        ``x_t`` [b, d] at that scale, ``t`` int64 [b], ``tokens`` int64 [b, 77], ``text_embedding`` unit norm
        [b, d], ``keep_text`` bool [b]: False hides caption and text embedding, never the noised embedding.
        """
        inputs, shown = self.caption_inputs(tokens, text_embedding, keep_text)
        shown = None if shown is None else F.pad(shown, (0, STEP_TOKENS), value=True)
        out = self.transformer(torch.cat([inputs, self.step_inputs(x_t, t)], dim=1), shown=shown, last_only=True)
        return self.embedding_out(out, self.regress(tokens, text_embedding, keep_text))

    def caption_inputs(self, tokens: Tensor, text_embedding: Tensor, keep_text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns inputs for captions and text embeddings, [b, n, width], and which of them are shown, [b, n]."""
        embedding = self.embedding_in(text_embedding.to(self.query.dtype) * self.embed_dim**0.5)  # of unit variance
        embedding = torch.where(keep_text[:, None], embedding, self.null_embedding) + self.position[0]
        return torch.cat([self.caption(tokens, keep_text), embedding[:, None]], dim=1), None

    def step_inputs(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns inputs for the timestep, the noised embedding and the query, [b, 3, width]."""
        step = self.timestep(timestep_embedding(t, self.config.width).to(self.query.dtype))
        noised = self.noised_in(x_t.to(self.query.dtype))
        return torch.stack([step, noised, self.query.expand_as(step)], dim=1) + self.position[-STEP_TOKENS:]

    def embedding_out(self, out: Tensor, line: Tensor | None = None) -> Tensor:
        """Returns the clean embedding [b, d] from the transformer's output at the query, in full precision.

        ``line`` holds embeddings by the regression, to which the transformer adds.
        """
        with torch.autocast(out.device.type, enabled=False):
            added = self.out(out[:, -1].to(self.query.dtype))
            return added if line is None else added + self.scale * line

    def image_embedding(self, samples: Tensor) -> Tensor:
        """Returns image embeddings, unit norm [b, d], of samples [b, d] of the diffusion."""
        return F.normalize(samples / self.scale, dim=-1)


def diffusion_prior_loss(model: DiffusionPrior, batch: dict[str, Tensor], rng: RandomStreams) -> Losses:
    """Returns the mean squared error of the clean embedding at the diffusion's scale, [b].

    ``batch`` has "tokens" int64 [b, 77], "text_embedding" and "image_embedding" [b, d] of unit norm. Text is hidden in
    training mode only: validation measures the model with it.
    """
    schedule = make_schedule(model.config.schedule, model.config.steps)
    x0 = batch["image_embedding"].float() * model.scale
    t = rng.integers("t", model.config.steps)
    x_t = q_sample(x0, rng.normal("noise", model.embed_dim), schedule.at(t))
    keep = rng.keep("drop_text", model.config.drop_text if model.training else 0.0)
    output = model(x_t, t, batch["tokens"], batch["text_embedding"], keep)
    return Losses(mean_over_row((output.float() - x0) ** 2), {})


def diffusion_prior_denoise(
    model: DiffusionPrior, tokens: Tensor, text_embedding: Tensor, guidance: float = 0.0
) -> Denoise:
    """Returns the denoiser for these captions; ``image_embedding`` makes embeddings of the samples.

    ``guidance`` is w in (1 + w) conditional - w unconditional.
    """
    schedule = make_schedule(model.config.schedule, model.config.steps)
    keep = guidance_rows(len(tokens), guidance, tokens.device)
    branches = len(keep) // len(tokens)
    with torch.no_grad():
        condition = model.condition(tokens.repeat(branches, 1), text_embedding.repeat(branches, 1), keep)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        output = guided_output(lambda x, times: model.predict(x, times, condition), x_t, t, guidance)
        return predict("x0", output, x_t, schedule.at(t))

    return denoise


def diffusion_prior_gamma(model: DiffusionPrior, examples: Iterable[tuple[dict[str, Tensor], RandomStreams]]) -> Tensor:
    """Returns Analytic-DPM's Gamma of the model with its captions, fp32 [steps] on the CPU.

    ``examples`` are batches as the loss takes them, each with its ``rng``. Measured at ``GAMMA_STEPS`` timesteps.
    """
    steps = model.config.steps
    times = strided_grid(steps, min(steps, GAMMA_STEPS)).flip(0).tolist()
    schedule = make_schedule(model.config.schedule, steps)
    measured = torch.cat(
        [
            squared_noise(
                diffusion_prior_denoise(model, batch["tokens"], batch["text_embedding"]),
                batch["image_embedding"].float() * model.scale,
                times,
                schedule,
                rng,
            )
            for batch, rng in examples
        ]
    )
    return fill_in(measured.mean(0), times, steps).float()


def diffusion_prior_variance(model: DiffusionPrior, grid: Tensor) -> Tensor | str:
    """Returns the variance for ``ancestral``: Analytic-DPM's on ``grid``, or "small" if Gamma was never measured.

    Guidance is not in Gamma: with it the variance is still that of the conditional model.
    """
    if model.gamma is None:
        return "small"
    # Embeddings have unit norm, so the mean square of a scaled component is the square of the configuration's scale.
    schedule = make_schedule(model.config.schedule, model.config.steps)
    return analytic_variance(model.gamma.cpu(), schedule, grid, data_variance=model.config.scale**2)


def best_of(samples: Tensor, text_embedding: Tensor) -> Tensor:
    """Returns [b, d]: of n samples a row, [n, b, d], the one with the highest dot product with ``text_embedding``.

    Samples have unit norm, or the longest would win.
    """
    best = (samples * text_embedding).sum(-1).argmax(0)
    return samples[best, torch.arange(samples.shape[1], device=samples.device)]
