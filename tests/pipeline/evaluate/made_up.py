"""Rows and subjects whose figures are known, and small worlds with a bundle of models that have hardly learnt."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ar_prior import ARPrior
from models.cascade import UnCLIP
from models.clip import Clip
from models.codec_fit import fit_codec
from models.decoder import Decoder
from models.diffusion_prior import DiffusionPrior
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.prior_configs import ARPriorConfig, ClipConfig, DiffusionPriorConfig
from models.sampling_config import SamplingConfig
from models.upsampler import Upsampler
from pipeline.data.source.drawings.world import Drawing
from pipeline.evaluate.metric import Metric
from pipeline.evaluate.recipe import EvaluationRecipe
from pipeline.evaluate.rows import SplitRows
from pipeline.evaluate.stage import run_evaluation
from pipeline.evaluate.statistics import derangement
from pipeline.evaluate.subject import Subject
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.stages import Context, Stage, stage_key
from pipeline.ledger import Ledger
from pipeline.store.records import put_blob, read_blob
from tests.pipeline.training.conftest import EMBED_DIM, World, make_world

PLANETS = [
    Drawing("planets", (surface, colour, "blue", ring, "one"))
    for surface, colour, ring in (("plain", "pink", "none"), ("banded", "red", "thin"), ("capped", "green", "broad"))
]
TEXT = {"text_context": 16, "text_width": 16, "text_depth": 1, "text_heads": 1}
SMALL = {"channels": 8, "depth": 1, "multipliers": (1,), "dropout": 0.0, "steps": 20}
DECODER = DecoderConfig(**SMALL, **TEXT, head_channels=8, attention_resolutions=(8,), patch=8)
CLIP = ClipConfig(
    embed_dim=EMBED_DIM, image_size=32, layers=(1,), width=32, patch=16, text_width=16, text_layers=1, text_heads=1
)
RECIPE = EvaluationRecipe(rows=10, image_rows=9, upsampler_rows=8, samples=2)
READS = ("pairs", "captions", "embeddings", "curation")  # the inputs of a decoder with a text encoder of its own
SAMPLING = SamplingConfig(prior_steps=2, decoder_steps=2, decoder_sampler="ddim", upsampler_256_steps=2, size=256)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(n: int, groups: int = 0, **batch: Tensor) -> SplitRows:
    """Returns n rows, each a group of its own or, with ``groups``, in so many groups of neighbours."""
    names = [f"{i}" for i in range(n)]
    of = [f"group {i * groups // n}" for i in range(n)] if groups else names
    captions = [f"caption {name}" for name in names]
    return SplitRows("test", names, [""] * n, of, captions, [None] * n, batch, derangement(captions))


def subject(metric: Metric, model: str, samples: int = 2, **unclip: Any) -> Subject:
    """Returns a model under a metric, in a bundle of no more than what is given."""
    recipe = EvaluationRecipe(samples=samples)
    return Subject(metric, model, cast(UnCLIP, SimpleNamespace(**unclip)), recipe, lambda note: None)


def awake(model: Decoder) -> Decoder:
    """Without the zeros with which a training begins, and with which all conditions give the same image."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def unclip(priors: tuple[str, ...] = ("ar", "diffusion")) -> UnCLIP:
    z = F.normalize(torch.randn(60, EMBED_DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    codec = fit_codec(z, z[:, 0].double(), 4, 8).codec
    ar = ARPriorConfig(**TEXT, prefix=4, width=16, depth=1, heads=1, buckets=8)
    diffusion = DiffusionPriorConfig(text_context=16, width=16, depth=1, heads=1, steps=20)
    upsampler = UpsamplerConfig(**SMALL, patch=8)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UnCLIP(
            clip=Clip.build(CLIP, 0),
            decoder=awake(Decoder(DECODER, EMBED_DIM)),
            diffusion_prior=DiffusionPrior(diffusion, EMBED_DIM) if "diffusion" in priors else None,
            ar_prior=ARPrior(ar, EMBED_DIM, 4) if "ar" in priors else None,
            codec=codec,
            upsampler_256=Upsampler(upsampler),
            sampling=replace(SAMPLING, prior=priors[-1]),
        )


@dataclass(frozen=True)
class Case:
    """A world with a bundle in its store."""

    world: World
    bundle: Artifact

    def context(self, recipe: EvaluationRecipe = RECIPE) -> Context:
        inputs = {name: self.world.inputs[name] for name in (*READS, "source")} | {"bundle": self.bundle}
        stage = Stage("evaluation", 1, recipe, tuple(inputs), run_evaluation)
        key = stage_key(stage, {name: artifact.key for name, artifact in inputs.items()})
        return Context(self.world.store, "evaluation", 1, key, recipe, None, inputs)

    def document(self, artifact: Artifact) -> dict[str, Any]:
        return json.loads(read_blob(self.world.store, artifact.blobs["evaluation.json"]))


def make_case(
    folder: Path, shards: int, rows: int, side: int, priors: tuple[str, ...] = ("ar", "diffusion"),
    drawings: Sequence[Drawing] = (),
) -> Case:  # fmt: skip
    """Returns a world whose bundle has these priors, and whose references name these drawings."""
    world = make_world(folder / "store", [rows + number for number in range(shards)], side, drawings)
    unclip(priors).save(folder / "bundle")
    files = [file for file in sorted((folder / "bundle").rglob("*")) if file.is_file()]
    blobs = {str(file.relative_to(folder / "bundle")): put_blob(world.store, file) for file in files}
    return Case(world, publish_artifact(world.store, Artifact("bundle", "b" * 64, {}, {}, Ledger(), blobs), 0.0))
