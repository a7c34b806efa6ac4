"""Measures the models of a bundle on held-out rows: does it learn?

Everything is a function of the inputs and the recipe, on rows and seeds that never change. Nothing here may be tuned on
test rows: a claim that fails is reported as failing.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from models.cascade import UnCLIP
from models.clip import Clip
from models.sampling_config import BASE, PRIORS, UPSAMPLERS
from pipeline.errors import UserError
from pipeline.evaluate import condition, parts, priors, upsamplers
from pipeline.evaluate.figure import Figure, count, without_values
from pipeline.evaluate.images import beside, draw_images, judged, load_judge
from pipeline.evaluate.recipe import EvaluationRecipe
from pipeline.evaluate.rows import SplitRows, Tick, held_out, training_rows
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.keys import flatten
from pipeline.graph.stages import Context
from pipeline.held_out import HELD_OUT_SPLITS, too_few
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.sampling.drawing import drawing_device, read_bundle
from pipeline.store.records import digest, materialise, put_blob
from pipeline.training.between_steps import preview_png
from pipeline.training.device import OutOfMemory, memory_for
from pipeline.training.task import Batch
from pipeline.training.tasks.starts import starting_rows

SHOWN = 8  # captions in the image of the report
STRIP = "held-out.png"


def evaluate(ctx: Context) -> Artifact:
    """Measures every model of the bundle, in this process and on all cores.

    Raises CorruptObject, and UserError for a judge that cannot be loaded.
    """
    began = time.monotonic()
    device = drawing_device()
    judge = load_judge(ctx.recipe.judge, device)
    with tempfile.TemporaryDirectory() as folder:
        materialise(ctx.store, ctx.inputs["bundle"].blobs, folder)
        unclip = read_bundle(folder, device)
    evaluation = Evaluation(ctx, unclip, device, judge)
    found: list[Figure] = []
    steps = evaluation.steps()
    with torch.no_grad(), Progress("evaluation", len(steps), "parts") as progress:
        for title, measure in steps.items():
            try:
                with memory_for(title):
                    found += measure(lambda note, title=title: progress.advance(0, f"{title}: {note}"))  # type: ignore[misc]
            except OutOfMemory as e:
                raise UserError(f"evaluation: {title} did not fit into memory; lower its rows in evaluation") from e
            progress.advance(1, title)
    # Conditions are measured model by model, and are one line at the end.
    figures = [figure.as_json() for figure in sorted(found, key=lambda figure: figure.line == condition.LINE)]
    document = {
        "version": ctx.version,
        "figures": figures,
        "rows": evaluation.keys,
        "few": evaluation.few,
        "recipe": flatten(ctx.recipe),
        "sampling": dataclasses.asdict(unclip.sampling),
    }
    blobs = {"evaluation.json": put_blob(ctx.store, (json.dumps(document, indent=1) + "\n").encode())}
    if evaluation.strip is not None:
        blobs[STRIP] = put_blob(ctx.store, preview_png(evaluation.strip))
    metrics = {"holds": count(figures), "figures": without_values(figures), "shown": evaluation.shown}
    rows = 0 if isinstance(evaluation.rows, str) else len(evaluation.rows)
    environment = {"device": str(device)}
    artifact = ctx.publishable(blobs=blobs, ledger=Ledger(kept=rows), metrics=metrics, environment=environment)
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)


@dataclass
class Evaluation:
    """Measures a bundle's models step by step; figures are returned, the rest is left in attributes.

    Attributes:
        judge: A second CLIP that looks at the drawn images.
        strip: The image of the report, uint8 [3, h, w], if there is one: real images above those drawn for them.
        shown: Caption of each of its columns, and license of the real image; the models that drew the rows below.
        keys: Keys of all rows that were measured, with their split, by what they are for.
        few: Number of rows where they are too few, by what they are for.
    """

    ctx: Context
    unclip: UnCLIP
    device: torch.device
    judge: Clip | None = None
    strip: Tensor | None = None
    shown: dict[str, list[Any]] = field(default_factory=dict)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    few: dict[str, int] = field(default_factory=dict)

    def steps(self) -> dict[str, Callable[[Tick], list[Figure]]]:
        """Returns what is to be measured, by title."""
        chosen: dict[str, Callable[[Tick], list[Figure]]] = {"images": self.images}
        chosen |= {stage: partial(self.prior, name) for name, stage in self.priors.items()}
        return chosen | {n: partial(self.upsampler, n) for n in UPSAMPLERS if getattr(self.unclip, n) is not None}

    @property
    def recipe(self) -> EvaluationRecipe:
        return self.ctx.recipe

    @property
    def priors(self) -> dict[str, str]:
        """Returns the priors that the bundle has: stage by the name that sampling goes by."""
        return {name: stage for name, stage in PRIORS.items() if getattr(self.unclip, stage) is not None}

    @cached_property
    def rows(self) -> SplitRows | str:
        """Returns rows without images, for the priors, or why there are none."""
        return self._held_out("priors", self.recipe.rows, 0)

    @cached_property
    def training(self) -> Batch:
        return starting_rows(self.ctx, ("text_embedding", "image_embedding"))

    def _held_out(self, what: str, rows: int, side: int) -> SplitRows | str:
        found = held_out(self.ctx.store, self.ctx.inputs, rows, side)
        if isinstance(found, int):
            self.keys[what] = {"split": None, "keys": []}
            self.few[what] = found
            # Where there are too few rows at all, that is why, not how few of them have a large image.
            general = self.rows if side else ""
            large = f" with an image of {side} px" if side else ""
            return general if isinstance(general, str) and general else too_few(found, HELD_OUT_SPLITS[0], large)
        self.keys[what] = {"split": found.split, "keys": found.keys, "captions": digest(found.captions)}
        return found.to(self.device)

    def images(self, tick: Tick) -> list[Figure]:
        """Returns what images of 64 px show, and whether the decoder uses its condition; keeps some to be shown."""
        rows = self._held_out("images", self.recipe.image_rows, BASE)
        if isinstance(rows, str):
            return [_absent(condition.LINE, "decoder", "condition", rows)]
        figures = [condition.decoder_condition(self.unclip, rows, self.recipe.seed)]
        truths = parts.truths(rows.urls)
        drawn = self._drawn(rows if any(truths) or self.judge else rows.first(SHOWN), tick)
        if any(truths):
            trained = training_rows(self.ctx.store, self.ctx.inputs, len(rows)).to(self.device)
            known = parts.read_parts(self._drawn(trained, tick), parts.truths(trained.urls), tick)
            figures += parts.part_figures(parts.read_parts(drawn, truths, tick), known, rows, self.recipe.seed)
        elif self.judge:
            figures += judged(self.judge, drawn, rows, self.recipe.seed)
        real = rows.batch["image"].permute(0, 2, 3, 1).cpu()
        self.strip = beside(*(line[:SHOWN] for line in (real, *drawn.values())))
        self.shown = {
            "captions": rows.captions[:SHOWN], "licenses": rows.licenses[:SHOWN], "models": list(drawn),
        }  # fmt: skip
        return figures

    def _drawn(self, rows: SplitRows, tick: Tick) -> dict[str, Tensor]:
        """Returns an image a row by each prior, and by the decoder from the images' own embeddings."""
        asked = {**{stage: name for name, stage in self.priors.items()}, "decoder": None}
        return {model: draw_images(self.unclip, rows, prior, self.recipe.seed, tick) for model, prior in asked.items()}

    def prior(self, prior: str, tick: Tick) -> list[Figure]:
        """Returns whether one prior comes nearer to images than baselines without weights, and uses its caption."""
        stage, rows, recipe = PRIORS[prior], self.rows, self.recipe
        if isinstance(rows, str):
            return [
                _absent(priors.nearer(stage), stage, "found", rows),
                _absent(condition.LINE, stage, "condition", rows),
            ]
        samples = priors.sample_embeddings(self.unclip, prior, rows, recipe.samples, recipe.seed, tick)
        return [
            *priors.prior_figures(stage, samples, rows, self.training, recipe.seed),
            condition.prior_condition(self.unclip, stage, rows, recipe.seed),
        ]

    def upsampler(self, name: str, tick: Tick) -> list[Figure]:
        """Returns whether one upsampler beats bicubic interpolation, and uses its small image."""
        model, recipe = getattr(self.unclip, name), self.recipe
        rows = self._held_out(name, recipe.upsampler_rows, model.config.image_size)
        if isinstance(rows, str):
            return [
                _absent(upsamplers.line(name), name, "psnr", rows), _absent(condition.LINE, name, "condition", rows)
            ]  # fmt: skip
        sampling, count = self.unclip.sampling, recipe.samples
        return [
            upsamplers.upsampler_figure(name, model, rows, sampling, count, recipe.seed, tick),
            condition.upsampler_condition(name, model, rows, recipe.seed),
        ]


def _absent(line: str, model: str, name: str, why: str) -> Figure:
    """Returns a figure that could not be measured, and why."""
    return Figure(line, model, name, model, note=why)
