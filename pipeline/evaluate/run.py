"""Measures the models of a bundle on held-out rows: does it learn?

Everything is a function of the inputs and the recipe, on rows and seeds that never change. Nothing here may be tuned on
test rows: a figure that fails is reported as failing.

Line (f) wants an earlier checkpoint of the decoder. It is not an input of the graph, because it would be a training of
its own there: the decoder's training publishes it on its way, as a milestone at ``recipe.early`` samples (see
pipeline.training.stage). Its key follows from the decoder's recipe and from inputs that are inputs here too, so with
``early`` in the recipe this stage's key says which checkpoint is meant before anything runs. It is missing only from
stores in which the decoder was trained without it, and then a line says so.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch

from models.decoder import Decoder
from models.folder import load_model
from pipeline.errors import CorruptObject, UserError
from pipeline.evaluate.evaluation import GUIDANCES, Evaluation
from pipeline.evaluate.figure import count, judged, without_values
from pipeline.evaluate.inception import load_inception, package_versions
from pipeline.evaluate.quality import load_judge
from pipeline.evaluate.stage import VERSION
from pipeline.graph.artifacts import Artifact, artifact_path, load_artifact, publish_artifact
from pipeline.graph.damage import set_aside
from pipeline.graph.keys import flatten
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.sampling.drawing import drawing_device, read_bundle
from pipeline.store.records import materialise, put_blob
from pipeline.training.between_steps import preview_png
from pipeline.training.device import OutOfMemory, memory_for
from pipeline.training.worker import at_stop

log = logging.getLogger("unclip")


def evaluate(ctx: Context) -> Artifact:
    """Measures every model of the bundle, in this process and on all cores.

    Raises CorruptObject, and UserError for a judge or an Inception that cannot be loaded.
    """
    began = time.monotonic()
    device = drawing_device()
    judge = load_judge(ctx.recipe.judge, device)
    inception = load_inception(ctx.store, ctx.recipe.inception, device)
    with tempfile.TemporaryDirectory() as folder:
        materialise(ctx.store, ctx.inputs["bundle"].blobs, folder)
        unclip = read_bundle(folder, device)
    evaluation = Evaluation(ctx.store, ctx.inputs, unclip, ctx.recipe, early_decoder(ctx, device), judge, inception)
    figures: list[dict[str, Any]] = []
    parts = evaluation.parts()
    with torch.no_grad(), Progress("evaluation", len(parts), "parts") as progress:
        for title, measure in parts.items():
            try:
                with memory_for(title):
                    found = measure(lambda note, title=title: progress.advance(0, f"{title}: {note}"))  # type: ignore[misc]
            except OutOfMemory as e:
                raise UserError(f"evaluation: {title} did not fit into memory; lower its rows in evaluation") from e
            figures += [figure.as_json() for figure in found]
            progress.advance(1, title)
    document = {
        "version": VERSION,
        "figures": figures,
        "rows": evaluation.keys,
        "few": evaluation.few,
        "captions": evaluation.captions,
        "recipe": flatten(ctx.recipe),
        "sampling": dataclasses.asdict(unclip.sampling),
    }
    blobs = {"evaluation.json": put_blob(ctx.store, (json.dumps(document, indent=1) + "\n").encode())}
    blobs |= {name: put_blob(ctx.store, preview_png(image)) for name, image in evaluation.shown.items()}
    metrics = {
        "holds": count(figures),
        "figures": without_values(judged(figures)),
        "captions": evaluation.captions,
        "named": evaluation.named,
        "closest": evaluation.closest,
        "guidances": GUIDANCES,
        "licenses": evaluation.licenses,
    }
    rows = 0 if isinstance(evaluation.rows, str) else len(evaluation.rows)
    environment = {"device": str(device), **(package_versions() if inception else {})}
    artifact = ctx.publishable(blobs=blobs, ledger=Ledger(kept=rows), metrics=metrics, environment=environment)
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)


def early_decoder(ctx: Context, device: torch.device) -> Decoder | str:
    """Returns the decoder as it was after ``recipe.early`` samples, from the store, or why it cannot be had."""
    early, recipe = ctx.recipe.early, ctx.config.decoder
    if early == 0:
        return "evaluation.early is 0"
    if not recipe.batch <= early <= recipe.fork or early >= recipe.samples:
        end = f"samples {recipe.samples:,}" + (f" less decay {recipe.decay:,}" if recipe.decay else "")
        return f"evaluation.early {early:,} is not between decoder.batch {recipe.batch:,} and {end}"
    inputs = {name: artifact for name, artifact in ctx.inputs.items() if name not in ("source", "bundle")}  # its own
    decoder = replace(ctx, stage="decoder", version=recipe.version, recipe=recipe, inputs=inputs)
    key = at_stop(decoder, early).key
    artifact = load_artifact(ctx.store, "decoder", key)
    if artifact is None:
        return f"the decoder at {early:,} samples is not in the store; a decoder trained from the start leaves it there"
    with tempfile.TemporaryDirectory() as folder:
        try:
            materialise(ctx.store, artifact.blobs, folder)
        except CorruptObject as e:  # not an input, so nobody would make it again
            log.warning("%s; the decoder at %s samples is not compared with", e, f"{early:,}")
            try:
                set_aside(ctx.store, [e.path, artifact_path("decoder", key)])
            except UserError as why:
                log.warning("%s", why)
            return f"the decoder at {early:,} samples was damaged; a decoder trained from the start leaves a new one"
        return load_model(folder, device)
