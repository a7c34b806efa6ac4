"""The graph of one configuration, as a literal that one can read. Imports neither Ray nor torch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from pipeline.config import Config
from pipeline.data.codec import stage as codec
from pipeline.data.curation import stage as curation
from pipeline.data.curation import thresholds
from pipeline.data.embeddings import stage as embeddings
from pipeline.data.neighbours import stage as neighbour_index
from pipeline.data.pairs import stage as pairs
from pipeline.data.source import imported
from pipeline.data.source import stage as source
from pipeline.errors import UserError
from pipeline.evaluate import stage as evaluation
from pipeline.graph.stages import Graph, Stage
from pipeline.sampling import bundle, samples
from pipeline.training import stage as training


def build(config: Config) -> Graph:
    """Stages in an order in which every one comes after its inputs.

    Raises UserError for imported embeddings without the CLIP that made them.
    """
    if not config.clip.pretrained:
        for path in config.source.paths:
            if imported.is_embeddings(Path(os.path.expanduser(path))):
                raise UserError(
                    f"source {path}: imported embeddings teach no CLIP; name in clip.weights what made them"
                )
    learn = ("pairs", "captions", "embeddings", "curation")
    of_ar_prior, of_diffusion_prior, of_decoder = (
        (*learn, "clip") if recipe.model.text_encoder == "frozen" else learn
        for recipe in (config.ar_prior, config.diffusion_prior, config.decoder)
    )
    thresholded = ("thresholds",) if config.thresholds.similarity else ()
    stages = (
        *(
            Stage(
                name,
                source.VERSION,
                config.source,
                (),
                run,
                kind="source",
                splitting=config.source.splitting,
                row_seconds=seconds,
            )
            for name, run, seconds in (
                ("source", source.run_source, 32e-6),
                ("captions", source.run_captions, 1e-6),
            )
        ),
        Stage(
            "pairs", pairs.VERSION, config.pairs, ("source",), pairs.run_pairs, row_seconds=0.02, given=config.source
        ),
        training.stage("clip", config.clip, ("pairs", "captions"), training.run_clip, pinned=True),
        Stage(
            "embeddings",
            embeddings.VERSION,
            config.embeddings,
            ("pairs", "captions", "clip"),
            embeddings.run_embeddings,
            passes=True,
        ),
        Stage(
            "thresholds",
            thresholds.VERSION,
            config.thresholds,
            ("pairs", "embeddings"),
            thresholds.run_thresholds,
            pinned=True,
            passes=True,
            row_seconds=1e-4,
        ),
        Stage(
            "curation",
            curation.VERSION,
            config.curation,
            ("pairs", "captions", "embeddings", *thresholded),
            curation.run_curation,
            passes=True,
            row_seconds=2e-4,
        ),
        Stage(
            "index",
            neighbour_index.VERSION,
            config.index,
            ("embeddings", "curation"),
            neighbour_index.run_index,
            passes=True,
            row_seconds=5e-5,
        ),
        Stage(
            "codec",
            codec.VERSION,
            config.codec,
            ("embeddings", "curation"),
            codec.run_codec,
            pinned=True,
            passes=True,
            row_seconds=2e-4,
        ),
        training.stage("ar_prior", config.ar_prior, (*of_ar_prior, "codec")),
        training.stage("diffusion_prior", config.diffusion_prior, of_diffusion_prior),
        training.stage("decoder", config.decoder, of_decoder),
        training.stage("upsampler_256", config.upsampler_256, ("pairs", "curation")),
        training.stage("upsampler_1024", config.upsampler_1024, ("pairs", "curation")),
        Stage(
            "bundle",
            bundle.VERSION,
            config.bundle,
            config.bundle.inputs,
            bundle.run_bundle,
            "bundle",
            given=config.source,
        ),
        Stage("samples", samples.VERSION, config.samples, ("bundle",), samples.run_samples, kind="result"),
        Stage(
            "evaluation",
            evaluation.VERSION,
            config.evaluation,
            (*of_decoder, "source", "bundle"),
            evaluation.run_evaluation,
            kind="result",
        ),
    )
    # Models, and what is pinned for them, are made only where a later stage needs them.
    needed = {stage.name for stage in stages if stage.kind != "training" and not stage.pinned}
    for stage in reversed(stages):
        if stage.name in needed:
            needed |= set(stage.inputs)
    return {
        stage.name: replace(stage, settings=getattr(config.run, stage.name, stage.settings))
        for stage in stages
        if stage.name in needed
    }
