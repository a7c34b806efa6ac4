"""CLIP: images and captions into one space."""

from __future__ import annotations

import tempfile
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F

from models.clip import Clip
from models.clip_loss import Gather, alone, clip_loss
from models.losses import Losses
from models.prior_configs import ClipConfig
from models.random_streams import RandomStreams
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.store.records import put_blob
from pipeline.training.task import Batch, Examples


class ClipTask:
    """Trains by a contrastive loss.

    A row's loss depends on its whole batch, so a worker's rows stay in one piece, of which ``at_once`` rows are encoded
    at once, and ``gather`` fetches those of the other workers.
    """

    columns: tuple[str, ...] = ("image", "tokens")
    min_side = 0
    splittable = False
    validation_rows = 512
    validation_batch = 64

    def __init__(self, config: ClipConfig):
        self.config = config
        self.image_size = config.image_size
        self.local_statistics = config.tower == "resnet"
        self.gather: Gather = alone
        self.at_once = 0

    def model(self, seed: int) -> Clip:
        return Clip.build(self.config, seed)

    def loss(self, model: Clip, batch: Batch, rng: RandomStreams) -> Losses:
        return clip_loss(model, batch, rng, self.gather, self.config.least_crop, self.at_once)

    def validate(self, model: Clip, examples: Examples) -> dict[str, float]:
        """Returns the contrastive "loss" among all validation rows, and "recall_at_1" of captions given images."""
        image = torch.cat([model.encode_image(batch["image"]) for batch, _ in examples])
        text = torch.cat([model.encode_text(batch["tokens"]) for batch, _ in examples])
        labels = torch.arange(len(image), device=image.device)
        with torch.autocast(image.device.type, enabled=False):  # in bf16 many cosines are equal
            logits = model.model.logit_scale.exp().clamp(max=100).float() * image.float() @ text.float().T
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        return {"loss": float(loss), "recall_at_1": float((logits.argmax(1) == labels).float().mean())}

    def save(self, model: Clip, folder: Path) -> None:
        model = deepcopy(model)
        model.silence_unread_tokens()
        model.save(folder)


def make(ctx: Context) -> ClipTask:
    """Returns the task of a training stage."""
    return ClipTask(ctx.recipe.model)


def take_clip(ctx: Context) -> Artifact:
    """Publishes a CLIP that somebody else has trained, in open_clip's local-dir layout."""
    began = time.monotonic()
    try:
        clip = Clip.named(ctx.recipe.weights)
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"clip.weights: {e}") from e
    with tempfile.TemporaryDirectory() as folder:
        clip.save(folder)
        blobs = {file.name: put_blob(ctx.store, file, move=True) for file in sorted(Path(folder).iterdir())}
    metrics = {"embed_dim": clip.embed_dim, "image_size": clip.image_size}
    artifact = ctx.publishable(ledger=Ledger(), blobs=blobs, metrics=metrics)
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)
