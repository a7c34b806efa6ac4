"""The 64 px decoder: image embeddings, and captions, to images."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from models.decoder import Decoder, decoder_denoise, decoder_loss
from models.diffusion.samplers import ddim
from models.diffusion.schedules import make_schedule, trailing_grid
from models.frozen_text import FrozenTower
from models.image_configs import DecoderConfig
from models.losses import Losses
from models.pixels import to_uint8
from models.random_streams import RandomStreams
from pipeline.graph.stages import Context
from pipeline.training.feed.tables import embedding_dim
from pipeline.training.task import Batch, Examples
from pipeline.training.tasks.figures import FolderTask, conditional_figures, grid
from pipeline.training.tasks.starts import frozen_tower, starting_rows

_PREVIEW_STEPS = 25


class DecoderTask(FolderTask):
    """Trains by the hybrid loss on images of the decoder's size, given embeddings and captions."""

    columns: tuple[str, ...] = ("image", "tokens", "image_embedding")
    validation_rows = 128
    validation_batch = 32
    preview_rows = 8

    def __init__(
        self,
        config: DecoderConfig,
        embed_dim: int,
        tower: FrozenTower | None = None,
        embeddings: Tensor | None = None,
    ):
        self.config, self.embed_dim, self.tower, self.embeddings = config, embed_dim, tower, embeddings
        self.min_side = self.image_size = config.image_size

    def network(self) -> Decoder:
        return Decoder(self.config, self.embed_dim, self.tower and self.tower.sizes)

    def start(self, model: Decoder) -> None:
        super().start(model)
        if model.whitening is not None and self.embeddings is not None:
            model.whitening.fit(self.embeddings)

    def loss(self, model: Decoder, batch: Batch, rng: RandomStreams) -> Losses:
        return decoder_loss(model, batch, rng)

    def validate(self, model: Decoder, examples: Examples) -> dict[str, float]:
        """Returns the "loss", and its rise with another row's embedding and caption."""
        conditions = ("image_embedding", "tokens")
        return conditional_figures(partial(self.loss, model), examples, conditions, self.config.steps)

    def preview(self, model: Decoder, batch: Batch, rng: RandomStreams) -> Tensor:
        """Returns the images, and below them what their embeddings and captions become, without guidance."""
        config = self.config
        denoise = decoder_denoise(model, batch["image_embedding"], batch["tokens"], guidance=0.0)
        noise = rng.normal("preview", 3, config.image_size, config.image_size)
        timesteps = trailing_grid(config.steps, min(config.steps, _PREVIEW_STEPS))
        drawn = ddim(denoise, noise, timesteps, make_schedule(config.schedule, config.steps))
        return grid(batch["image"], to_uint8(drawn))


def make(ctx: Context) -> DecoderTask:
    """Returns the task of a training stage, for the embeddings that it trains on."""
    dim = embedding_dim(ctx.store, ctx.inputs["embeddings"])
    embeddings = starting_rows(ctx, ("image_embedding",))["image_embedding"] if ctx.recipe.model.whiten else None
    return DecoderTask(ctx.recipe.model, dim, frozen_tower(ctx), embeddings)
