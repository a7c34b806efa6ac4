"""All stages, and the graph of one configuration. Each stage is declared in its own folder.

Imports neither Ray nor torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import is_dataclass, replace
from typing import Any

from pipeline.data.codec.stage import CODEC
from pipeline.data.curation.row_filter import FILTER
from pipeline.data.curation.stage import CURATION
from pipeline.data.curation.thresholds import THRESHOLDS
from pipeline.data.embeddings.stage import EMBEDDINGS
from pipeline.data.neighbours.stage import INDEX
from pipeline.data.pairs.stage import PAIRS
from pipeline.data.recaption.stage import RECAPTION
from pipeline.data.source.stage import CAPTIONS, SOURCE
from pipeline.errors import UserError, did_you_mean
from pipeline.evaluate.stage import EVALUATION
from pipeline.graph.stages import Graph, Stage
from pipeline.plugins import broken, plugins
from pipeline.sampling.bundle import BUNDLE
from pipeline.sampling.samples import SAMPLES
from pipeline.training.stage import AR_PRIOR, CLIP, DECODER, DIFFUSION_PRIOR, UPSAMPLER_256, UPSAMPLER_1024

STAGES = (
    SOURCE,
    CAPTIONS,
    PAIRS,
    RECAPTION,
    FILTER,
    CLIP,
    EMBEDDINGS,
    THRESHOLDS,
    CURATION,
    INDEX,
    CODEC,
    AR_PRIOR,
    DIFFUSION_PRIOR,
    DECODER,
    UPSAMPLER_256,
    UPSAMPLER_1024,
    BUNDLE,
    SAMPLES,
    EVALUATION,
)
"""In an order in which every one comes after its inputs."""
GROUP = "unclip.stages"  # of entry points, each named as its stage


def all_stages(more: Iterable[Stage] = ()) -> tuple[Stage, ...]:
    """Returns the pipeline's stages, those of installed packages, and ``more``, each after its inputs.

    Raises UserError for a stage that cannot be used.
    """
    found = {stage.name: stage for stage in STAGES}
    rest = [*plugins(GROUP).items(), *((stage.name, stage) for stage in more)]
    while rest:
        name, stage = next((each for each in rest if not _wrong(*each, found)), rest[0])
        if why := _wrong(name, stage, found):
            raise broken(GROUP, name, why) if stage is plugins(GROUP).get(name) else UserError(f"stage {name}: {why}")
        rest.remove((name, stage))
        found[name] = stage
    return tuple(found.values())


def _wrong(name: str, stage: Any, others: Collection[str]) -> str:
    """Returns why a stage cannot be used beside others; "" where it can."""
    if not isinstance(stage, Stage):
        return "it is not an unclip.stages.Stage"
    if stage.name != name:
        return f"it declares the stage {stage.name}, and both need one name"
    if name in others:
        return "its name is taken"
    if not (isinstance(stage.recipe, type) and is_dataclass(stage.recipe)):
        return "its recipe is not a dataclass"
    if stage.kind == "source":
        return "the source is one stage, and lists are added as unclip.sources"
    if missing := next((each for each in stage.inputs if each not in others), ""):
        return f"it reads {missing}, which no stage makes{did_you_mean(missing, others)}"
    return ""


def build(config: Any) -> Graph:
    """Returns the stages that a Config asks for, bound to it, in an order in which every one comes after its inputs."""
    stages = list(_fed(stage.bound(config) for stage in config.stages))
    needed = {stage.name for stage in stages if not (stage.kind == "training" or stage.pinned or stage.on_demand)}
    for stage in reversed(stages):
        if stage.name in needed:
            needed |= set(stage.inputs)
    return {stage.name: stage for stage in stages if stage.name in needed}


def _fed(stages: Iterable[Stage]) -> Iterator[Stage]:
    """Yields stages in order, each with the inputs that stand for those it declares."""
    instead: dict[str, str] = {}
    for stage in stages:
        roles = {instead[name]: name for name in stage.inputs if name in instead}
        yield replace(stage, inputs=tuple(instead.get(name, name) for name in stage.inputs), roles=roles)
        if stage.stands_for and (name := stage.stands_for(stage.recipe)):
            instead[name] = stage.name
