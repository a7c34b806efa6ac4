"""The diffusion prior: captions to image embeddings."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion_prior import (
    DiffusionPrior,
    diffusion_prior_denoise,
    diffusion_prior_gamma,
    diffusion_prior_loss,
)
from models.folder import save_model
from models.frozen_text import FrozenTower
from models.losses import Losses
from models.prior_configs import DiffusionPriorConfig
from models.random_streams import RandomStreams
from pipeline.graph.stages import Context
from pipeline.training.feed.tables import embedding_dim
from pipeline.training.task import Batch, Examples
from pipeline.training.tasks.figures import FolderTask, conditional_figures
from pipeline.training.tasks.starts import begin_line, frozen_tower, starting_rows


class DiffusionPriorTask(FolderTask):
    """Trains by the squared error of the clean embedding."""

    columns: tuple[str, ...] = ("tokens", "image_embedding", "text_embedding")
    min_side = 0
    image_size = 0
    validation_rows = 512
    validation_batch = 64
    finish_rows = 128  # at 64 timesteps each: as expensive as a training on 2,700 samples
    measured = ("gamma",)

    def __init__(
        self,
        config: DiffusionPriorConfig,
        embed_dim: int,
        tower: FrozenTower | None = None,
        rows: Batch | None = None,
    ):
        self.config, self.embed_dim, self.tower, self.rows = config, embed_dim, tower, rows

    def network(self) -> DiffusionPrior:
        return DiffusionPrior(self.config, self.embed_dim, self.tower and self.tower.sizes)

    def start(self, model: DiffusionPrior) -> None:
        super().start(model)
        begin_line(model.line, model.caption, self.rows)

    def loss(self, model: DiffusionPrior, batch: Batch, rng: RandomStreams) -> Losses:
        return diffusion_prior_loss(model, batch, rng)

    def validate(self, model: DiffusionPrior, examples: Examples) -> dict[str, float]:
        """Returns the "loss", its rise with another row's conditions, and cosines to the image embedding."""
        loss = partial(self.loss, model)
        figures = conditional_figures(loss, examples, ("tokens", "text_embedding"), self.config.steps)
        return figures | self._cosines(model, examples)

    def _cosines(self, model: DiffusionPrior, examples: Examples) -> dict[str, float]:
        """Returns mean cosines to the image embedding: of the text embedding, and of the model's output for pure noise.

        For a perfect model the latter is the mean of all its samples.
        """
        of_mean, of_text = [], []
        for batch, rng in examples:
            image, text = batch["image_embedding"], batch["text_embedding"]
            denoise = diffusion_prior_denoise(model, batch["tokens"], text)
            last = torch.full((len(image),), self.config.steps - 1, device=image.device)
            mean = denoise(rng.normal("from_noise", self.embed_dim), last).x0
            of_mean.append(F.cosine_similarity(mean.float(), image.float()))
            of_text.append(F.cosine_similarity(text.float(), image.float()))
        return {"cosine_of_mean": float(torch.cat(of_mean).mean()), "cosine_of_text": float(torch.cat(of_text).mean())}

    def finish(self, model: DiffusionPrior, examples: Examples) -> dict[str, Tensor]:
        """Returns Analytic-DPM's "gamma"."""
        return {"gamma": diffusion_prior_gamma(model, examples)}

    def save(self, model: nn.Module, folder: Path, statistics: dict[str, Tensor] | None = None) -> None:
        save_model(folder, model, model.state_dict() | (statistics or {}))


def make(ctx: Context) -> DiffusionPriorTask:
    """Returns the task of a training stage, for the embeddings that it trains on."""
    rows = starting_rows(ctx, DiffusionPriorTask.columns, ctx.recipe.captions) if ctx.recipe.model.ridge else None
    dim = embedding_dim(ctx.store, ctx.inputs["embeddings"])
    return DiffusionPriorTask(ctx.recipe.model, dim, frozen_tower(ctx), rows)
