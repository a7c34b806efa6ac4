"""What a trial is judged by: figures of one model on validation rows, each with a 95% bootstrap interval over rows."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor

from models.ar_prior import ARPrior
from models.cascade import UnCLIP
from models.clip import Clip
from models.codec import Codec
from models.decoder import Decoder, decoder_denoise
from models.diffusion.process import mean_over_row, q_sample
from models.diffusion.samplers import Denoise
from models.diffusion.schedules import make_schedule
from models.diffusion_prior import DiffusionPrior, diffusion_prior_denoise
from models.draw import Draw
from models.folder import load_model
from models.pixels import from_uint8
from models.prior_configs import DiffusionPriorConfig
from models.tokens import tokenize
from pipeline.evaluate.captions import Phrases
from pipeline.evaluate.images import backgrounds, draw_images
from pipeline.evaluate.metrics import bootstrap, cosine, derangement, variance_ratio
from pipeline.evaluate.names import FIRST
from pipeline.evaluate.priors import nats_per_code
from pipeline.evaluate.quality import Eye, choices, right
from pipeline.evaluate.retrieval import median_interval, ranks
from pipeline.evaluate.rows import COLUMNS, GALLERY, HeldOut, read_views
from pipeline.graph.stages import Context
from pipeline.held_out import FEWEST
from pipeline.store.records import materialise, read_blob
from pipeline.training.feed.tables import JoinedRow, Tables

Found = tuple[float, float, float]
"""A figure, and its 95% interval: value, low, high."""

SEED = 0  # of noise and resampling, the same in every trial
ROWS = 512  # of losses, at most
NAMED = 256  # images whose name is asked for, at most
DRAWN = 128  # images drawn, at most
QUARTERS = 4
ENCODED = 64  # at once
SIDE = 64  # pixels
PATCH = 4  # pixels
LEVEL = 1 / 255  # at most, the spread within a patch of a real image that is level, but for what JPEG makes of it


def measure(stage: str, ctx: Context, models: Mapping[str, str], splits: Sequence[str]) -> dict[str, Found]:
    """Returns the figures of a model, those of "test" rows under "held_out_" and their name.

    A split with too few rows has none.

    Args:
        stage: What was trained.
        ctx: Has the store, the artefacts, CLIP among them where it was not trained, and the configuration, with the
            phrases of captions and the sampling defaults.
        models: Folders by stage, and as "prior" and "judge".
        splits: "validation", "test" or both.
    """
    found: dict[str, Found] = {}
    for split in splits:
        if stage == "clip":
            figures = clip_figures(Clip.from_folder(models["clip"]), ctx, ctx.config.evaluation.phrases, split)
        else:
            figures = _Measured(ctx, models, split).figures(stage)
        prefix = "held_out_" if split == "test" else ""
        found |= {f"{prefix}{name}": value for name, value in figures.items()}
    return found


def mean(values: Tensor) -> Found:
    """Returns the mean of [n] and its interval."""
    return float(values.double().mean()), *bootstrap(values.double(), torch.arange(len(values)), SEED)


def listed(ctx: Context, split: str, columns: Sequence[str], side: int = 0) -> list[JoinedRow]:
    """Returns the rows of a split that have an image and are not variants by the phrases, always in the same order."""
    phrases = ctx.config.evaluation.phrases
    tables = Tables(ctx.store, ctx.inputs, columns, split, side)
    rows = tables.first(sum(tables.counts))
    return [row for row in rows if row.place and not phrases.is_variant(caption(row))]


def caption(row: JoinedRow) -> str:
    """Returns the first caption of a row, "" for none."""
    return (row.captions or [""])[0]


# --- CLIP -------------------------------------------------------------------------------------------------------------


def clip_figures(clip: Clip, ctx: Context, phrases: Phrases, split: str) -> dict[str, Found]:
    """Returns how often an image finds its own caption and its own name among 100, and what ``other_style`` does."""
    known = {name: listed(ctx, name, ("image", "tokens")) for name in dict.fromkeys(("train", "validation", split))}
    rows = known[split]
    if len(rows) < FEWEST:
        return {}
    seen = {name: _encoded(clip, ctx, part) for name, part in known.items()}
    # Held-out names stand among held-out names alone.
    more = [caption(row) for row in known["train"]] if split != "test" else []
    offered = choices(Eye("CLIP", clip), [caption(row) for row in rows[:NAMED]], more, phrases)
    found = {choice.name: mean(right(choice, seen[split][:NAMED])[0]) for choice in offered}
    everything = [(caption(row), name == split) for name, part in known.items() for row in part]
    return found | other_style(torch.cat([*seen.values()]), everything, phrases)


def _encoded(clip: Clip, ctx: Context, rows: Sequence[JoinedRow]) -> Tensor:
    views = read_views(ctx.store, [row.place for row in rows if row.place], clip.image_size)
    return torch.cat([clip.encode_image(part) for part in views.split(ENCODED)])


def other_style(images: Tensor, rows: Sequence[tuple[str, bool]], phrases: Phrases) -> dict[str, Found]:
    """Returns how an image ranks the image of its own name in another style, among all images of other styles.

    Args:
        images: Embeddings of all images, [n, d].
        rows: The caption of each, and whether it asks.
        phrases: Say which words of a caption are style and name.

    Returns:
        The median rank, and the share of ranks within the FIRST; {} where fewer than FEWEST images have another one.
    """
    parts = [phrases.parts(text) for text, _ in rows]
    places: list[Tensor] = []
    for style in phrases.styles:
        others = [i for i, part in enumerate(parts) if part and part.style != style]
        first: dict[str, int] = {}
        for place, i in enumerate(others):
            first.setdefault(parts[i].name, place)  # type: ignore[union-attr]
        asking = [
            i for i, part in enumerate(parts) if part and part.style == style and rows[i][1] and part.name in first
        ]
        if asking:
            own = torch.tensor([first[parts[i].name] for i in asking])  # type: ignore[union-attr]
            places.append(ranks(images[asking], images[others], own))
    found = torch.cat(places) if places else torch.empty(0)
    if len(found) < FEWEST:
        return {}
    interval = median_interval(found, torch.zeros_like(found), torch.arange(len(found)), SEED)
    return {"other_style_rank": (float(found.median()), *interval), "other_style_first_10": mean(found <= FIRST)}


# --- decoder and priors -----------------------------------------------------------------------------------------------


@dataclass
class _Measured:
    """A decoder, a prior or both, with what looks at what they make."""

    ctx: Context
    models: Mapping[str, str]
    split: str

    def __post_init__(self) -> None:
        ctx, models = self.ctx, self.models
        rows = listed(ctx, self.split, COLUMNS, SIDE)[:ROWS]
        self.rows = _held_out(ctx, self.split, rows) if len(rows) >= FEWEST else None
        with tempfile.TemporaryDirectory() as folder:
            materialise(ctx.store, ctx.inputs["clip"].blobs, folder)
            clip = Clip.from_folder(folder)
        priors = [models[name] for name in ("ar_prior", "diffusion_prior", "prior") if name in models]
        self.prior = load_model(priors[0]) if priors else None
        self.decoder: Decoder | None = load_model(models["decoder"]) if "decoder" in models else None
        self.judge = Eye("judge", Clip.from_folder(models["judge"])) if "judge" in models else None
        ar = isinstance(self.prior, ARPrior)
        self.codec = Codec(**load(read_blob(ctx.store, ctx.inputs["codec"].blobs["model.safetensors"]))) if ar else None
        # Where no prior is given, none is asked; but a cascade has one.
        diffusion = self.prior or DiffusionPrior(DiffusionPriorConfig(3, 8, 1, 1, 2), clip.embed_dim)
        self.unclip = UnCLIP(
            clip,
            self.decoder,  # type: ignore[arg-type]
            diffusion_prior=None if ar else diffusion,
            ar_prior=self.prior if ar else None,
            codec=self.codec,
            sampling=self.ctx.config.bundle.sampling,
        )
        self.kind = "ar" if ar else "diffusion"

    def figures(self, stage: str) -> dict[str, Found]:
        """Returns the figures of the model of a stage."""
        if self.rows is None:
            return {}
        found = self.losses(stage)
        if stage != "decoder":
            found |= self.embeddings()
        if self.decoder is not None:
            drawn = self.rows.first(min(DRAWN, len(self.rows)))
            if stage == "decoder":
                found |= self.images(drawn, drawn.batch["image_embedding"], "image")
            if self.prior is not None:
                found |= self.images(drawn, None, "caption")
        return found

    def losses(self, stage: str) -> dict[str, Found]:
        """Returns squared errors of the clean data by quarter of t, or nats a code."""
        assert self.rows is not None
        batch = self.rows.batch
        if stage == "ar_prior":
            assert self.codec is not None
            assert self.prior is not None
            dot = self.codec.encode_dot((batch["image_embedding"].double() * batch["text_embedding"].double()).sum(-1))
            coded = batch | {"codes": self.codec.encode(batch["image_embedding"]), "dot": dot}
            return {"nats": mean(nats_per_code(self.prior, coded).mean(1))}
        model: Any = self.decoder if stage == "decoder" else self.prior
        parts = []
        for start in range(0, len(self.rows), ENCODED):
            part = {name: column[start : start + ENCODED] for name, column in batch.items()}
            draw = Draw([(SEED + start, len(part["tokens"]))])
            if stage == "decoder":
                denoise = decoder_denoise(model, part["image_embedding"], part["tokens"], guidance=0.0)
                x0 = from_uint8(part["image"])
            else:
                denoise = diffusion_prior_denoise(model, part["tokens"], part["text_embedding"])
                x0 = part["image_embedding"] * model.scale
            parts.append(errors(denoise, x0, model.config, draw))
        return {f"x0_error_{i + 1}": mean(values) for i, values in enumerate(torch.cat(parts).T)}

    def embeddings(self) -> dict[str, Found]:
        """Returns how near the embeddings that a prior draws are to those of the images."""
        assert self.rows is not None
        rows = self.rows.first(min(GALLERY, len(self.rows)))
        seeds = list(range(len(rows)))
        sampling, batch = self._sampling(), rows.batch
        drawn = self.unclip.draw_embedding(batch["tokens"], batch["text_embedding"], seeds, sampling)
        ratio, interval = variance_ratio(drawn[None], batch["image_embedding"], torch.arange(len(drawn)), SEED)
        others = listed(self.ctx, "train", COLUMNS, SIDE)[: GALLERY - len(rows)]
        more = [row.image_embedding for row in others if row.image_embedding is not None]
        filled = torch.from_numpy(np.stack(more)) if more else batch["image_embedding"][:0]
        places = ranks(drawn, torch.cat([batch["image_embedding"], filled]), torch.arange(len(rows)))
        return {
            "embedding_cosine": mean(cosine(drawn, batch["image_embedding"])),
            "embedding_first_10": mean(places <= FIRST),
            "variance_ratio": (ratio, *interval),
        }

    def _sampling(self) -> Any:
        return self.unclip.sampling_with({"prior": self.kind, "size": SIDE})

    def images(self, rows: HeldOut, embeddings: Tensor | None, source: str) -> dict[str, Found]:
        """Returns the figures of images drawn of ``embeddings`` [n, d], or of captions alone; names begin so."""
        drawn = draw_images(self.unclip, rows, embeddings, self.kind, SEED, lambda note: None)
        real = rows.batch["image"].permute(0, 2, 3, 1)
        found = {}
        if embeddings is not None:
            found["dots"] = mean(dots(drawn, real))
        phrases = self.ctx.config.evaluation.phrases
        named = [(i, name) for i, text in enumerate(rows.captions) if (name := phrases.background(text))]
        if len(named) >= FEWEST:
            seen = backgrounds(drawn[[i for i, _ in named]], phrases.backgrounds)
            hits = [colour == name for colour, (_, name) in zip(seen, named, strict=True)]
            found["background"] = mean(torch.tensor(hits))
        if self.judge is not None:
            seen_drawn, gallery = self.judge.look(drawn), self.gallery()
            places = ranks(seen_drawn, gallery, torch.arange(len(rows)))
            found["first_10"] = mean(places <= FIRST)
            found["cosine"] = mean(cosine(seen_drawn, gallery[: len(rows)]))
        return {f"{source}_{name}": value for name, value in found.items()}

    def gallery(self) -> Tensor:
        """Returns the judge's embeddings of real images: those of the rows, filled up from training rows."""
        assert self.rows is not None
        assert self.judge is not None
        own = self.rows.batch["image"][:GALLERY]
        more = listed(self.ctx, "train", COLUMNS, SIDE)[: GALLERY - len(own)]
        filled = read_views(self.ctx.store, [row.place for row in more if row.place], SIDE) if more else own[:0]
        return self.judge.look(torch.cat([own, filled]).permute(0, 2, 3, 1))


def _held_out(ctx: Context, split: str, rows: list[JoinedRow]) -> HeldOut:
    captions = [caption(row) for row in rows]
    batch = {
        name: F.normalize(torch.from_numpy(np.stack([getattr(row, name) for row in rows])), dim=-1)
        for name in ("image_embedding", "text_embedding")
    }
    batch |= {"tokens": tokenize(captions), "image": read_views(ctx.store, [r.place for r in rows if r.place], SIDE)}
    keys = [row.key for row in rows]  # each a group of its own
    return HeldOut(split, keys, keys, captions, [row.license for row in rows], batch, derangement(captions))


def errors(denoise: Denoise, x0: Tensor, config: Any, draw: Draw) -> Tensor:
    """Returns mean squared errors of x0 [b, ...] at a random t in each quarter of the timesteps, fp32 [b, QUARTERS].

    The first quarter has the least noise. They compare whatever the network predicts.
    """
    schedule, size = make_schedule(config.schedule, config.steps), config.steps // QUARTERS
    found = []
    for quarter in range(QUARTERS):
        t = quarter * size + draw.integers(f"t {quarter}", size)
        noise = draw.normal(f"noise {quarter}", *x0.shape[1:])
        found.append(mean_over_row((denoise(q_sample(x0, noise, schedule.at(t)), t).x0 - x0) ** 2))
    return torch.stack(found, dim=1)


def dots(drawn: Tensor, real: Tensor) -> Tensor:
    """Returns the spread within patches that ought to be level, as a share of the range, fp64 [n].

    It is the standard deviation over a patch of PATCH x PATCH pixels, a colour at a time, root mean square over the
    patches at the border of the image that are level in the ``real`` one; 0 for an image without any.

    Args:
        drawn: uint8 [n, s, s, 3].
        real: The same.
    """

    def variance(images: Tensor) -> Tensor:  # of each patch, [n, s / PATCH, s / PATCH]
        cut = images.double().unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).transpose(2, 3)
        return (cut / 255).var((3, 4), unbiased=False).mean(-1)

    level = variance(real) <= LEVEL**2
    level[:, 1:-1, 1:-1] = False
    total = (variance(drawn) * level).flatten(1).sum(1)
    return (total / level.flatten(1).sum(1).clamp(min=1)).sqrt()
