"""The autoregressive prior: captions to the codes of image embeddings."""

from __future__ import annotations

from functools import partial
from math import log

from safetensors.torch import load

from models.ar_prior import ARPrior, ar_prior_loss
from models.codec import Codec
from models.frozen_text import FrozenTower
from models.losses import Losses
from models.prior_configs import ARPriorConfig
from models.random_streams import RandomStreams
from pipeline.errors import UserError
from pipeline.graph.stages import Context
from pipeline.store.records import read_blob
from pipeline.training.feed.tables import embedding_dim
from pipeline.training.task import Batch, Examples
from pipeline.training.tasks.figures import FolderTask, conditional_figures
from pipeline.training.tasks.starts import begin_line, frozen_tower, starting_rows


class ARPriorTask(FolderTask):
    """Trains by the cross-entropy of codes, in nats a code. ``codec`` turns embeddings into codes."""

    columns: tuple[str, ...] = ("tokens", "image_embedding", "text_embedding")
    min_side = 0
    image_size = 0
    validation_rows = 256
    validation_batch = 32

    def __init__(
        self,
        config: ARPriorConfig,
        embed_dim: int,
        codec: Codec,
        tower: FrozenTower | None = None,
        rows: Batch | None = None,
    ):
        self.config, self.embed_dim, self.codec, self.tower, self.rows = config, embed_dim, codec, tower, rows

    def network(self) -> ARPrior:
        return ARPrior(self.config, self.embed_dim, self.codec.codes, self.tower and self.tower.sizes)

    def start(self, model: ARPrior) -> None:
        super().start(model)
        begin_line(model.line, model.caption, self.rows)
        if self.config.ridge:
            model.start_from(self.codec)

    def loss(self, model: ARPrior, batch: Batch, rng: RandomStreams) -> Losses:
        device = batch["image_embedding"].device
        if self.codec.mean.device != device:
            self.codec = self.codec.to(device)
        return ar_prior_loss(model, batch, rng, self.codec)

    def validate(self, model: ARPrior, examples: Examples) -> dict[str, float]:
        """Returns the "loss", its rise with another row's caption and text embedding, and "nats_below_uniform".

        The latter is how much less a code costs than one of equally likely buckets, as a codec's are.
        """
        figures = conditional_figures(partial(self.loss, model), examples, ("tokens", "text_embedding"))
        return figures | {"nats_below_uniform": log(self.config.buckets) - figures["loss"]}


def make(ctx: Context) -> ARPriorTask:
    """Returns the task of a training stage, for its embeddings and its codec.

    Raises UserError if the codec has another number of buckets.
    """
    codec = Codec(**load(read_blob(ctx.store, ctx.inputs["codec"].blobs["model.safetensors"])))
    if codec.buckets != ctx.recipe.model.buckets:
        raise UserError(
            f"ar_prior.model.buckets: {ctx.recipe.model.buckets}, but the codec has {codec.buckets}; make them equal"
        )
    rows = starting_rows(ctx, ARPriorTask.columns, ctx.recipe.captions) if ctx.recipe.model.ridge else None
    dim = embedding_dim(ctx.store, ctx.inputs["embeddings"])
    return ARPriorTask(ctx.recipe.model, dim, codec, frozen_tower(ctx), rows)
