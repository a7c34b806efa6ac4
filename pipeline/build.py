"""All stages, and the graph of one configuration. Each stage is declared in its own folder.

Imports neither Ray nor torch.
"""

from __future__ import annotations

from typing import Any

from pipeline.data.codec.stage import CODEC
from pipeline.data.curation.stage import CURATION
from pipeline.data.curation.thresholds import THRESHOLDS
from pipeline.data.embeddings.stage import EMBEDDINGS
from pipeline.data.neighbours.stage import INDEX
from pipeline.data.pairs.stage import PAIRS
from pipeline.data.source.stage import CAPTIONS, SOURCE
from pipeline.evaluate.stage import EVALUATION
from pipeline.graph.stages import Graph
from pipeline.sampling.bundle import BUNDLE
from pipeline.sampling.samples import SAMPLES
from pipeline.training.stage import AR_PRIOR, CLIP, DECODER, DIFFUSION_PRIOR, UPSAMPLER_256, UPSAMPLER_1024

STAGES = (
    SOURCE,
    CAPTIONS,
    PAIRS,
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


def build(config: Any) -> Graph:
    """Returns the stages that a Config asks for, bound to it, in an order in which every one comes after its inputs."""
    stages = [stage.bound(config) for stage in config.stages]
    # Models, and what is pinned for them, are made only where a later stage needs them.
    needed = {stage.name for stage in stages if stage.kind != "training" and not stage.pinned}
    for stage in reversed(stages):
        if stage.name in needed:
            needed |= set(stage.inputs)
    return {stage.name: stage for stage in stages if stage.name in needed}
