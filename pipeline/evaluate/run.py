"""Measures the models of a bundle on held-out rows: does it learn?

Figures are a function of the inputs and the recipe, on rows and seeds that never change. Nothing here may be tuned on
test rows: a claim that fails is reported as failing.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.cascade import UnCLIP
from models.clip import Clip
from models.sampling_config import BASE, PRIORS, UPSAMPLERS
from pipeline.errors import UserError
from pipeline.evaluate.condition import CONDITION
from pipeline.evaluate.figure import DOCUMENT, STRIP, Figure, without_values
from pipeline.evaluate.images import JUDGED, draw_images, image_grid, load_judge
from pipeline.evaluate.metric import DRAWERS, GROUP, Metric, Need, metrics_of_users, names_with_versions
from pipeline.evaluate.parts import PARTS_DRAWN, PartPredictions, read_parts, truths
from pipeline.evaluate.priors import COSINE, FOUND, Baselines, baselines, sample_embeddings
from pipeline.evaluate.recipe import EvaluationRecipe
from pipeline.evaluate.rows import SplitRows, Tick, held_out, training_rows
from pipeline.evaluate.subject import MissingInput, Subject
from pipeline.evaluate.upsamplers import PSNR
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.device import OutOfMemory, memory_for
from pipeline.graph.keys import flatten
from pipeline.graph.stages import Context
from pipeline.held_out import HELD_OUT_SPLITS, too_few
from pipeline.ledger import Ledger
from pipeline.plugins import broken
from pipeline.progress import Progress
from pipeline.sampling.drawing import drawing_device, read_bundle
from pipeline.store.records import digest, materialise, put_blob
from pipeline.training.results import preview_png
from pipeline.training.tasks.starts import starting_rows

BY_STAGE = {stage: name for name, stage in PRIORS.items()}
EACH = ("rows", "drawn", "samples")  # needs that differ between models
OURS = (*PARTS_DRAWN, JUDGED, FOUND, COSINE, PSNR, CONDITION)
DRAWN: Need = "drawn"
SHOWN = 8  # captions in the image of the report


def metrics() -> tuple[Metric, ...]:
    """Returns all metrics in the order of the table, those of users last. Raises UserError."""
    users = metrics_of_users()
    if taken := {metric.name for metric in OURS} & {metric.name for metric in users}:
        raise broken(GROUP, min(taken), "its name is taken")
    return (*OURS, *users)


def evaluate(ctx: Context) -> Artifact:
    """Measures every model of the bundle, in this process and on all cores.

    Raises CorruptObject, and UserError for a judge that cannot be loaded and for a user's metric that fails.
    """
    began = time.monotonic()
    device = drawing_device()
    chosen, planned = metrics(), getattr(ctx.recipe, "metrics", ())
    # This process may be on a machine with other packages than the one that planned.
    if (here := names_with_versions(chosen[len(OURS) :])) != planned:
        raise UserError(
            f"evaluation: planned with the plug-in metrics {', '.join(planned) or 'none'}, but here are "
            f"{', '.join(here) or 'none'}; install the same packages everywhere"
        )
    judge = load_judge(ctx.recipe.judge, device)
    with tempfile.TemporaryDirectory() as folder:
        materialise(ctx.store, ctx.inputs["bundle"].blobs, folder)
        unclip = read_bundle(folder, device)
    evaluation = Evaluation(ctx, unclip, device, judge)
    steps = [(metric, model) for metric in chosen for model in evaluation.have(metric.models)]
    found: dict[tuple[str, str], Figure] = {}
    with torch.no_grad(), Progress("evaluation", len(steps) + 1, "steps") as progress:

        @contextmanager
        def step(title: str) -> Iterator[None]:
            evaluation.tick = lambda note: progress.advance(0, f"{title}: {note}")
            try:
                with memory_for(title):
                    yield
            except OutOfMemory as e:
                raise UserError(f"evaluation: {title} did not fit into memory; lower its rows in evaluation") from e
            progress.advance(1, title)

        for metric, model in steps:
            with step(f"{metric.name} of {model}"):
                for figure in evaluation.measure(metric, model):
                    if found.setdefault((figure.model, figure.name), figure) is not figure:
                        why = f"its figure {figure.model}.{figure.name} has the name of another metric's"
                        raise broken(GROUP, metric.name, why)
        with step("images of the report"):
            strip = evaluation.strip()
    figures_found = [figure.as_json() for figure in found.values()]
    document = {
        "version": ctx.version,
        "figures": figures_found,
        "rows": evaluation.keys,
        "few": evaluation.few,
        "recipe": flatten(ctx.recipe),
        "sampling": dataclasses.asdict(unclip.sampling),
    }
    blobs = {DOCUMENT: put_blob(ctx.store, (json.dumps(document, indent=1) + "\n").encode())}
    if strip is not None:
        blobs[STRIP] = put_blob(ctx.store, preview_png(strip))
    artifact = ctx.publishable(
        blobs=blobs,
        ledger=Ledger(kept=len(evaluation.keys.get("priors", {}).get("keys", ()))),
        metrics={"figures": without_values(figures_found), "shown": evaluation.shown},
        environment={"device": str(device)},
    )
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)


@dataclass
class Evaluation:
    """Makes the arguments of metrics lazily, each of them once. Every method of a need may raise MissingInput.

    Attributes:
        clip: A second CLIP that looks at the drawn images.
        tick: Called with a line of progress.
        shown: Caption of each column of the report's image, and license of the real image; the models that drew the
            rows below it.
        keys: Keys of all rows that were measured, with their split, by what they are for.
        few: Number of rows where they are too few, by what they are for.
        made: Arguments made so far, or the reason why they are missing, by need and model.
    """

    ctx: Context
    unclip: UnCLIP
    device: torch.device
    clip: Clip | None = None
    tick: Tick = print
    shown: dict[str, list[Any]] = field(default_factory=dict)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    few: dict[str, int] = field(default_factory=dict)
    made: dict[tuple[Need, str], Any] = field(default_factory=dict)

    @property
    def recipe(self) -> EvaluationRecipe:
        return self.ctx.recipe

    def have(self, models: Iterable[str]) -> list[str]:
        """Returns those of ``models`` that the bundle has."""
        return [model for model in models if getattr(self.unclip, model) is not None]

    def measure(self, metric: Metric, model: str) -> list[Figure]:
        """Returns the figures of one model, or one with the reason where a need is missing. Raises UserError."""
        subject = Subject(metric, model, self.unclip, self.recipe, self.tick)
        try:
            needed = [self.need(name, model) for name in metric.needs]
        except MissingInput as why:
            return [subject.figure(note=str(why))] if str(why) else []
        try:
            figures = list(metric.measure(subject, *needed))
            if other := next((each for each in figures if not isinstance(each, Figure)), None):
                raise TypeError(f"it returns {other!r}, no Figure")
        except Exception as e:
            if metric in OURS:
                raise
            failure = f"it fails for {model}: {type(e).__name__}: {' '.join(str(e).split())}"
            raise broken(GROUP, metric.name, failure) from e
        return figures

    def need(self, name: Need, model: str = "") -> Any:
        """Returns the result of the method of this name; only the needs of EACH depend on the model."""
        key = name, model if name in EACH else ""
        if key not in self.made:
            try:
                self.made[key] = getattr(self, name)(model)
            except MissingInput as e:
                self.made[key] = e
        if isinstance(self.made[key], MissingInput):
            raise self.made[key]
        return self.made[key]

    def rows(self, model: str) -> SplitRows:
        """Returns held-out rows, with images of the side that the model makes; of a prior without images."""
        what, most, side = "images", self.recipe.image_rows, BASE
        if model in UPSAMPLERS:
            what, most, side = model, self.recipe.upsampler_rows, getattr(self.unclip, model).config.image_size
        elif model in PRIORS.values():
            what, most, side = "priors", self.recipe.rows, 0
        found = held_out(self.ctx.store, self.ctx.inputs, most, side)
        if isinstance(found, int):
            self.keys[what] = {"split": None, "keys": []}
            self.few[what] = found
            if side:  # raises MissingInput itself where there are too few rows of any size, which is the better reason
                self.need("rows", "ar_prior")
            raise MissingInput(too_few(found, HELD_OUT_SPLITS[0], f" with an image of {side} px" if side else ""))
        self.keys[what] = {"split": found.split, "keys": found.keys, "captions": digest(found.captions)}
        return found.to(self.device)

    def images(self, model: str) -> SplitRows:
        """Returns held-out rows with images of 64 px, which all of DRAWERS draw."""
        return self.need("rows", "decoder")

    def drawn(self, model: str) -> Tensor:
        """Returns an image for each of ``images``, uint8 [n, 64, 64, 3], by a prior and the decoder or by it alone."""
        return self._draw(self.need("images"), model)

    def _draw(self, rows: SplitRows, model: str) -> Tensor:
        return draw_images(self.unclip, rows, BY_STAGE.get(model), self.recipe.seed, self.tick)

    def parts(self, model: str) -> tuple[PartPredictions, PartPredictions]:
        """Returns predictions for the images of all models, for ``images`` and for training rows with drawings."""
        rows = self._where_truths(True)
        trained = training_rows(self.ctx.store, self.ctx.inputs, len(rows)).to(self.device)
        models = self.have(DRAWERS)
        theirs = {each: self._draw(trained, each) for each in models}
        ours = {each: self.need("drawn", each) for each in models}
        found = read_parts(ours, truths(rows.urls), self.tick)
        return found, read_parts(theirs, truths(trained.urls), self.tick)

    def judge(self, model: str) -> Clip:
        """Returns the second CLIP, for data without drawings of the truth."""
        self._where_truths(False)
        if self.clip is None:
            raise MissingInput
        return self.clip

    def _where_truths(self, there: bool) -> SplitRows:
        """Returns ``images`` if their truths can be drawn, or cannot. Raises MissingInput without a reason else."""
        try:
            rows = self.need("images")
        except MissingInput:
            raise MissingInput from None
        if any(truths(rows.urls)) != there:
            raise MissingInput
        return rows

    def samples(self, model: str) -> Tensor:
        """Returns image embeddings that a prior samples for ``rows``, [samples, n, d]."""
        rows, recipe = self.need("rows", model), self.recipe
        return sample_embeddings(self.unclip, BY_STAGE[model], rows, recipe.samples, recipe.seed, self.tick)

    def baselines(self, model: str) -> Baselines:
        """Returns the baselines for ``rows`` of priors."""
        training = starting_rows(self.ctx, ("text_embedding", "image_embedding"))
        return baselines(self.need("rows", model).batch["text_embedding"], training)

    def strip(self) -> Tensor | None:
        """Returns the image of the report, uint8 [3, h, w], if there are rows: drawn images below real ones."""
        try:
            rows = self.need("images").first(SHOWN)
        except MissingInput:
            return None
        models = self.have(DRAWERS)
        drawn = [self.made[k] if (k := (DRAWN, model)) in self.made else self._draw(rows, model) for model in models]
        self.shown = {"captions": rows.captions, "licenses": rows.licenses, "models": models}
        return image_grid(rows.batch["image"].permute(0, 2, 3, 1).cpu(), *(images[:SHOWN] for images in drawn))
