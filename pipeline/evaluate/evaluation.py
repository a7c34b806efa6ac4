"""Which figure is measured on which model and which rows, part by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from models.cascade import UnCLIP
from models.clip import Clip
from models.decoder import Decoder
from models.sampling_config import BASE, PRIORS, UPSAMPLERS
from pipeline.evaluate import images, memorisation, names, priors, quality, retrieval, upsamplers
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.inception import Inception, fid_figures
from pipeline.evaluate.rows import HeldOut, Tick, TrainingRows, held_out, named_rows, read_views, training_rows
from pipeline.evaluate.stage import EvaluationRecipe
from pipeline.evaluate.whitening import Whitening, fit_whitening
from pipeline.graph.artifacts import Artifact
from pipeline.held_out import HELD_OUT_SPLITS, too_few
from pipeline.store import Store
from pipeline.store.records import digest

SHOWN = 8  # captions in the images of the report
GUIDANCES = (0.0, 1.0, 3.0)  # of the decoder, in those that show what it does
Part = Callable[[Tick], list[Figure]]


@dataclass
class Evaluation:
    """Measures a bundle's models part by part; figures are returned, the rest is left in attributes.

    Attributes:
        early: The decoder's earlier checkpoint, or why there is none.
        judge: A second CLIP that looks at the drawn images.
        inception: The network of their FID.
        shown: Images for the report, uint8 [3, h, w], by file name.
        captions: Of the columns of "comparison.png".
        named: Caption and split of the columns of "names.png".
        closest: Caption and distance of the columns of "nearest.png".
        licenses: Of the real image in each column, by file name.
        keys: Of all rows that were measured, by part, with their split.
        few: How many rows there are where they are too few, by part.
    """

    store: Store
    inputs: Mapping[str, Artifact]
    unclip: UnCLIP
    recipe: EvaluationRecipe
    early: Decoder | str
    judge: Clip | None = None
    inception: Inception | None = None
    shown: dict[str, Tensor] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    named: list[dict[str, str]] = field(default_factory=list)
    closest: list[dict[str, Any]] = field(default_factory=list)
    licenses: dict[str, list[str | None]] = field(default_factory=dict)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    few: dict[str, int] = field(default_factory=dict)

    def parts(self) -> dict[str, Part]:
        """Returns what is to be measured, by title; every part returns its figures."""
        u = self.unclip
        chosen: dict[str, Part] = {}
        if u.ar_prior is not None:
            chosen["ar_prior"] = self.ar_prior
            chosen["ar_prior samples"] = partial(self.prior_samples, "ar")
        if u.diffusion_prior is not None:
            chosen["diffusion_prior"] = self.diffusion_prior
            chosen["diffusion_prior samples"] = partial(self.prior_samples, "diffusion")
        chosen["decoder"] = self.decoder
        chosen["images"] = self.drawn
        chosen["names"] = self.names
        for name in UPSAMPLERS:
            if getattr(u, name) is not None:
                chosen[name] = partial(self.upsampler, name)
        return chosen

    @property
    def device(self) -> torch.device:
        return self.unclip.clip.mean.device

    @cached_property
    def rows(self) -> HeldOut | str:
        """Rows without images, for the priors, or why there are none."""
        return self._held_out("priors", self.recipe.rows, 0)

    @cached_property
    def small(self) -> HeldOut | str:
        """Rows with images of 64 px, for the decoder, or why there are none.

        Captions that name a background come first: line (d) needs them, and an image is expensive.
        """
        phrases = self.recipe.phrases
        prefer = phrases.background if phrases.backgrounds else None
        return self._held_out("decoder", self.recipe.decoder_rows, BASE, prefer)

    @cached_property
    def training(self) -> TrainingRows:
        return training_rows(self.store, self.inputs)

    @cached_property
    def whitening(self) -> Whitening:
        return fit_whitening(self.training, self.recipe.phrases)

    @property
    def priors(self) -> dict[str, str]:
        """Returns the priors that the bundle has: stage by the name that sampling goes by."""
        return {name: stage for name, stage in PRIORS.items() if getattr(self.unclip, stage) is not None}

    @property
    def eyes(self) -> list[quality.Eye]:
        """Returns the CLIPs that look at images, the bundle's own first."""
        judge = [quality.Eye("judge", self.judge)] if self.judge else []
        return [quality.Eye("CLIP", self.unclip.clip), *judge]

    def _held_out(
        self, part: str, rows: int, side: int, prefer: Callable[[str], object] | None = None
    ) -> HeldOut | str:
        found = held_out(self.store, self.inputs, rows, side, prefer)
        if isinstance(found, int):
            self.keys[part] = {"split": None, "keys": []}
            self.few[part] = found
            # Where there are too few rows at all, that is why, not how few of them have a large image.
            general = self.rows if side else ""
            large = f" with an image of {side} px" if side else ""
            return general if isinstance(general, str) and general else too_few(found, HELD_OUT_SPLITS[0], large)
        self.keys[part] = {"split": found.split, "keys": found.keys, "captions": digest(found.captions)}
        return found.to(self.device)

    def ar_prior(self, tick: Tick) -> list[Figure]:
        """Returns lines (a) and (b) of the AR prior."""
        model, codec = self.unclip.ar_prior, self.unclip.codec
        assert model is not None
        assert codec is not None
        if isinstance(self.rows, str):
            return absent("ab", "ar_prior", self.rows)
        training = self.training.image_embedding.to(self.device)
        return priors.ar_prior_figures(model, codec, self.rows, training, self.recipe.seed)

    def diffusion_prior(self, tick: Tick) -> list[Figure]:
        """Returns line (a) of the diffusion prior."""
        if isinstance(self.rows, str):
            return absent("a", "diffusion_prior", self.rows)
        return [priors.diffusion_prior_gap(self.unclip, self.rows, self.recipe.seed)]

    def prior_samples(self, prior: str, tick: Tick) -> list[Figure]:
        """Returns line (c) of one prior, and how its samples rank images."""
        if isinstance(self.rows, str):
            return absent("c", PRIORS[prior], self.rows)
        recipe = self.recipe
        chosen = self.rows.first(min(recipe.sampled_rows, len(self.rows)))
        samples = priors.sample_embeddings(self.unclip, prior, chosen, recipe.prior_samples, recipe.seed, tick)
        model, gallery = PRIORS[prior], self.rows.batch["image_embedding"]
        return [
            *priors.sample_figures(model, samples, chosen, self.whitening, recipe.seed),
            *retrieval.prior_figures(model, samples, chosen, gallery, self.training, recipe.seed),
        ]

    def decoder(self, tick: Tick) -> list[Figure]:
        """Returns line (a) of the decoder."""
        if isinstance(self.small, str):
            return absent("a", "decoder", self.small)
        return [images.decoder_gap(self.unclip.decoder, self.small, self.recipe.seed)]

    def drawn(self, tick: Tick) -> list[Figure]:
        """Returns lines (d) and (f), the images, how good they are and whether they are copies."""
        rows, seed, phrases = self.small, self.recipe.seed, self.recipe.phrases
        if isinstance(rows, str):
            return absent("df" if phrases.backgrounds else "f", "decoder", rows)
        embedding, prior = rows.batch["image_embedding"], self.unclip.sampling.prior
        drawn = {"decoder": images.draw_images(self.unclip, rows, embedding, prior, seed, tick)}
        fewer = rows.first(min(self.recipe.caption_rows, len(rows)))
        for name, stage in self.priors.items():
            drawn[stage] = images.draw_images(self.unclip, fewer, None, name, seed, tick)
        early: Tensor | str = self.early if isinstance(self.early, str) else ""
        if isinstance(self.early, Decoder):
            unclip = replace(self.unclip, decoder=self.early)
            early = images.draw_images(unclip, rows, embedding, prior, seed, tick)
        figures = []
        for model, made in drawn.items() if phrases.backgrounds else ():
            source = "the image's embedding" if model == "decoder" else "the caption alone"
            chosen = rows if model == "decoder" else fewer
            figures.append(images.background_figure(model, source, made, chosen, phrases, seed))
        figures += images.ranking_figures(self.unclip.clip, rows, drawn["decoder"], early, seed)
        figures += self._looked_at(rows, drawn, early, tick)
        config = self.unclip.decoder.config
        if min(config.drop_image, config.drop_text):  # else guidance is refused: it never saw a row without them
            self._guide(rows.first(len(self.captions)), tick)
        return figures

    def names(self, tick: Tick) -> list[Figure]:
        """Returns line (g) and how often right real images are found, of held-out rows and of training rows."""
        if isinstance(self.small, str):
            return self._unnamed(self.small)
        return [*self._named(self.small.split, True, tick), *self._named("train", False, tick)]

    def _unnamed(self, why: str) -> list[Figure]:
        """Returns why line (g) is not measured; nothing where it is not claimed."""
        stages = self.priors.values() if self.recipe.phrases.named else ()
        return [figure for stage in stages for figure in absent("g", stage, why)]

    def _named(self, split: str, claim: bool, tick: Tick) -> list[Figure]:
        """Returns the figures of images that are drawn from captions of a split, and keeps some of these."""
        recipe, phrases = self.recipe, self.recipe.phrases
        found = named_rows(self.store, self.inputs, phrases, split, recipe.name_rows, BASE)
        if isinstance(found, int):
            return self._unnamed(names.too_few_alike(found, split)) if claim else []
        every, count = found
        rows, real = every.first(count).to(self.device), every.batch["image"].permute(0, 2, 3, 1)
        if claim:
            self.keys["names"] = {"split": split, "keys": rows.keys, "captions": digest(rows.captions)}
        drawn = {
            stage: images.draw_images(self.unclip, rows, None, name, recipe.seed, tick)
            for name, stage in self.priors.items()
        }
        figures: list[Figure] = []
        for eye in self.eyes:
            tick(f"{eye.name} looks at images")
            seen = {stage: eye.look(made) for stage, made in drawn.items()}
            figures += names.named_figures(eye, seen, eye.look(real), rows, phrases, recipe.seed, claim)
        grid = images.beside(*(line[:SHOWN] for line in (real, *drawn.values())))
        self.shown["names.png"] = torch.cat([self.shown["names.png"], grid], 2) if "names.png" in self.shown else grid
        self.named += [{"caption": caption, "split": split} for caption in rows.captions[:SHOWN]]
        self.licenses["names.png"] = [*self.licenses.get("names.png", []), *rows.licenses[:SHOWN]]
        return figures

    def _guide(self, rows: HeldOut, tick: Tick) -> None:
        """Keeps what the decoder draws of the same embeddings and noise with each of GUIDANCES."""
        lines = []
        for weight in GUIDANCES:
            unclip = replace(self.unclip, sampling=replace(self.unclip.sampling, decoder_guidance=weight))
            embedding, prior = rows.batch["image_embedding"], unclip.sampling.prior
            lines.append(images.draw_images(unclip, rows, embedding, prior, self.recipe.seed, tick))
        self.shown["guidance.png"] = images.beside(*lines)
        self.licenses["guidance.png"] = list(rows.licenses)  # drawn from other people's images, and near to them

    def _looked_at(self, rows: HeldOut, drawn: dict[str, Tensor], early: Tensor | str, tick: Tick) -> list[Figure]:
        """Measures the drawn images by CLIP, the judge and Inception, and keeps those to be shown."""
        real = rows.batch["image"].permute(0, 2, 3, 1).cpu()
        training = self._training_images(self.recipe.phrases.alike(rows.captions, self.training.captions))
        more = [] if isinstance(self.rows, str) else self.rows.captions
        everything = drawn | ({"early": early} if isinstance(early, Tensor) else {})
        figures: list[Figure] = []
        for eye in self.eyes:
            tick(f"{eye.name} looks at images")
            seen = {kind: eye.look(made) for kind, made in (everything | {"real": real}).items()}
            of_real = seen.pop("real")
            arguments = (seen, of_real, eye.look(training), rows, more, self.recipe.phrases, self.recipe.seed)
            figures += quality.quality_figures(eye, *arguments)
            if eye.clip is self.unclip.clip:
                of_drawn = {model: seen[model] for model in drawn}
                known = self.training.image_embedding
                figures += memorisation.memorisation_figures(of_drawn, of_real, known, rows, self.recipe.seed)
                sampled = PRIORS[self.unclip.sampling.prior]
                self._show(rows, drawn, drawn[sampled], seen[sampled])
        if self.inception:
            tick("Inception looks at images")
            seen = {kind: self.inception.look(made) for kind, made in everything.items()}
            figures += fid_figures(seen, self.inception.look(real), self.inception.look(training), rows)
        return figures

    def _training_images(self, chosen: list[int]) -> Tensor:
        """Returns images of BASE px of training rows, uint8 [n, 64, 64, 3]."""
        return read_views(self.store, [self.training.places[i] for i in chosen], BASE).permute(0, 2, 3, 1)

    def _show(self, rows: HeldOut, drawn: Mapping[str, Tensor], sampled: Tensor, seen: Tensor) -> None:
        """Keeps images for the report: what each model made of the first captions, and possible copies.

        These are of the images ``sampled`` from captions, with embeddings ``seen``, the nearest to training images,
        above these.
        """
        real = rows.batch["image"].permute(0, 2, 3, 1).cpu()
        shown = min(SHOWN, *map(len, drawn.values()))
        self.captions = rows.captions[:shown]
        self.licenses["comparison.png"] = rows.licenses[:shown]
        self.shown["comparison.png"] = images.beside(*(lines[:shown] for lines in (real, *drawn.values())))
        nearest = memorisation.nearest(seen, self.training.image_embedding)
        closest = memorisation.closest(nearest.distance, SHOWN)
        found = nearest.place[closest].tolist()
        self.closest = [{"caption": rows.captions[i], "distance": float(nearest.distance[i])} for i in closest]
        self.licenses["nearest.png"] = [self.training.licenses[i] for i in found]
        self.shown["nearest.png"] = images.beside(sampled[closest], self._training_images(found))

    def upsampler(self, name: str, tick: Tick) -> list[Figure]:
        """Returns lines (a) and (e) of one upsampler, and more of its images."""
        model, recipe = getattr(self.unclip, name), self.recipe
        rows = self._held_out(name, getattr(recipe, f"{name}_rows"), model.config.image_size)
        if isinstance(rows, str):
            return absent("ae", name, rows)
        sampling, count = self.unclip.sampling, recipe.upsampler_samples
        return [
            upsamplers.upsampler_gap(name, model, rows, recipe.seed),
            *upsamplers.upsampler_figures(name, model, rows, sampling, count, recipe.seed, tick),
        ]


def absent(lines: str, model: str, why: str) -> list[Figure]:
    """Returns a figure for each of the ``lines`` of a model that could not be measured, and why."""
    return [Figure(line, model, f"absent_{line}", model, note=why) for line in lines]
