"""A bundle: the folders of all models that turn a caption into an image, with sampling defaults."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from models.prior_configs import STEP_TOKENS
from models.sampling_config import MODELS, PRIORS, UPSAMPLERS, SamplingConfig, check_sampling, largest_side
from pipeline.data.source.lists import lists_there
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, is_preview, publish_artifact
from pipeline.graph.stages import Context, Recipes, Stage
from pipeline.ledger import Ledger
from pipeline.store.records import put_blob


@dataclass(frozen=True)
class BundleRecipe:
    """Says which models go into a bundle, and how to sample from them by default.

    Attributes:
        models: Models of the bundle: the decoder, one or both priors, and none, one or both upsamplers. Others are not
            trained. ``small`` and ``karlo`` leave out the AR prior, with its codec: sampling uses it only if
            ``sampling.prior`` is ``ar``.
        sampling: Sampling defaults.
    """

    models: tuple[str, ...] = MODELS
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.models if name not in MODELS]:
            raise ValueError(f"models: {unknown[0]} is not one of {', '.join(MODELS)}")
        if "decoder" not in self.models or not set(PRIORS.values()) & set(self.models):
            raise ValueError("models: a bundle needs the decoder and at least one prior")
        for before, after in pairwise(UPSAMPLERS):
            if after in self.models and before not in self.models:
                raise ValueError(f"models: {after} needs {before} before it")
        if PRIORS[self.sampling.prior] not in self.models:
            raise ValueError(
                f"sampling.prior: {self.sampling.prior}, but {PRIORS[self.sampling.prior]} is not among models"
            )
        largest = largest_side(self.models)
        if self.sampling.size > largest:
            raise ValueError(f"sampling.size: {self.sampling.size}, but these models reach {largest} px at most")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Returns the stages that a bundle is made from."""
        codec = ("codec",) if "ar_prior" in self.models else ()
        return ("clip", *codec, *(name for name in MODELS if name in self.models))


def run_bundle(ctx: Context) -> Artifact:
    """Gathers the models' files under one folder each. Copies nothing: a bundle names the blobs of its parts."""
    # Without previews, which show other people's images: a bundle travels.
    blobs = {
        f"{stage}/{name}": blob
        for stage, part in ctx.inputs.items()
        for name, blob in part.blobs.items()
        if not is_preview(name)
    }
    sampling = json.dumps(dataclasses.asdict(ctx.recipe.sampling), indent=2)
    blobs["sampling.json"] = put_blob(ctx.store, sampling.encode())
    blobs["README.md"] = put_blob(ctx.store, _card(ctx).encode())
    return publish_artifact(ctx.store, ctx.publishable(blobs=blobs, ledger=Ledger()), 0.0)


def _card(ctx: Context) -> str:
    lines = [
        f"# {ctx.project}",
        "",
        "An unCLIP text-to-image model. `unclip.load(path)` opens it as a bundle, and in diffusers' layout",
        "`DiffusionPipeline.from_pretrained(path, trust_remote_code=True)` does.",
        "",
    ]
    lines += ["| part | key | samples seen |", "| --- | --- | ---: |"]
    for name, part in ctx.inputs.items():
        lines.append(f"| {name} | {part.key[:12]} | {part.recipe.get('samples', '')} |")
    # Names without folders, which are this machine's: a bundle travels.
    lines += ["", f"Trained on: {', '.join(Path(path).name for path in ctx.given.paths)}."]
    lines += dict.fromkeys(found.credits for found in lists_there(ctx.given.paths) if found.credits)
    return "\n".join(lines) + "\n"


def passes_of_a_row(name: str, recipes: Recipes) -> float:
    """Returns the forward passes of a network for one drawn row, in units of a forward pass of its training."""
    # With its cache the AR prior computes each position once, which is one pass. The diffusion prior computes the
    # caption's positions once and STEP_TOKENS positions at each step.
    sampling = recipes["bundle"]
    steps = float(sampling.get(f"sampling.{name.removeprefix('diffusion_')}_steps", 1))
    if name == "diffusion_prior":
        steps = 1 + steps * STEP_TOKENS / (recipes[name]["model.text_context"] + 1 + STEP_TOKENS)
    guidance = f"sampling.{'prior' if name in PRIORS.values() else name}_guidance"
    return steps * (2 if sampling.get(guidance) else 1)


def _fits(stage: Stage, config: Any) -> None:
    try:
        models = {name: getattr(config, name).model for name in stage.recipe.models}
        check_sampling(stage.recipe.sampling, models)
    except ValueError as e:
        raise UserError(f"bundle.sampling.{e}") from e


BUNDLE = Stage(
    "bundle",
    version=3,
    recipe=BundleRecipe,
    inputs=("clip", *MODELS),
    needs=lambda stage, config: stage.recipe.inputs,
    run=run_bundle,
    kind="bundle",
    fits=_fits,
    given=lambda config: config.source,  # for the model card
)
